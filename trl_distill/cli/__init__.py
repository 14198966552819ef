"""The console command `trl-distill`, and the scripts' mains."""
