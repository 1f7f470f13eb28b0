from stmae import show_config

show_config()
