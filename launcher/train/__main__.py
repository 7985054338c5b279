"""Entry of a rank. Installs the stop handlers before anything slow is imported, then hands over to ``live``."""

from launcher.train.stop import listen

if __name__ == "__main__":
    stop = listen()

    import sys

    from launcher.train.live import live

    live(sys.argv[1:], stop)
