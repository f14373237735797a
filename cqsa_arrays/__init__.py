"""placeholder, replaced with the lazy public names"""
