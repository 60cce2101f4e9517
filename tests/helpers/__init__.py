"""What tests share: a small corpus, two ways to run the command, real processes, servers and
peers."""
