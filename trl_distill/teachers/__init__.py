"""Teachers: who judges, and how a judgement is obtained."""
