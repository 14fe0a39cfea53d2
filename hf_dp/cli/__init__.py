"""The command line ``hf-dp``; one file per subcommand, each importing what it needs when it runs."""
