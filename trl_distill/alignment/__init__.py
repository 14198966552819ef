"""Two tokenizations of one text: bytes of tokens, ids that two vocabularies share, spans of a completion."""
