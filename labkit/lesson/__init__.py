"""A lesson's page at work: the Lab that `labkit.start` gives, its records, claims, challenges and exercise checks."""
