"""What is installed, under which name, and how it is made. Imports no torch until something is made."""
