"""The student above its teacher: teachers that are often wrong, a reward, and the weight between them."""
