"""How far a result may be trusted: parity, distances, likelihoods, and the page that shows them."""
