"""What a row of training is for a kind of model: how it is loaded, encoded, trained and answered."""
