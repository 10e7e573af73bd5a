"""Every architecture through every stage; `make sweep` writes docs/models.md."""
