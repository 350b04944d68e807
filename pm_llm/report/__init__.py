"""What is said of a run: tables, figures, page, model card, the Hub."""
