"""Speed, memory and accuracy of caop_fast beside the code people use instead: see README.md."""
