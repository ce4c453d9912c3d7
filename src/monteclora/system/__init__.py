"""What the operating system and the libraries give: atomic files, devices and ranks, random generators, quiet."""
