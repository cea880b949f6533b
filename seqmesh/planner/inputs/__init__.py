"""What is planned: model, machine, job, and the text of the command line that names them."""
