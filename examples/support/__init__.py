"""Code that you can skip at first. The first line of each file says its purpose."""
