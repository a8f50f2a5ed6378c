"""What kills, damaged files and hostile clients may do to tarflow, tried: nothing but a sentence, or what was right."""
