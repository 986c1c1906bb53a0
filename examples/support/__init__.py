"""What a first reading of the examples may skip. The first line of each file says its purpose."""
