"""What was measured, as files and pictures: traces of which page came in when and why, and their plots."""
