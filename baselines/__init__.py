"""What LM2 is compared with: another recurrent memory, and retrieval."""
