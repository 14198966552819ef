"""How fast, and how large, is an update?"""
