"""Real data for the demonstration, installed with the package as ``cqsa_arrays.data``. See README.md here."""
