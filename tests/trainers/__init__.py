"""Other people's trainers, run for real on a few tiny images: the blocks of docs/trainers.md, before and after."""
