"""Files, the web and the command line: what the rooms share and a checkpoint does not carry."""
