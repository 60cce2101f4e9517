"""What a person looks at: self-contained pages, and tables in a terminal."""
