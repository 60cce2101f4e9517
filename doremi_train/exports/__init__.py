"""The mixture in the forms of other trainers."""
