"""What to read, and the tools of a course: hand-outs and grades."""
