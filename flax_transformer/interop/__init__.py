"""Other systems' model files, from and to run folders."""
