"""`OPDTrainer`, its loss, its setup, and what makes a run stop and resume safely."""
