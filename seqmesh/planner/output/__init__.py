"""What is made of an answer: report, records, picture, timeline, recipe."""
