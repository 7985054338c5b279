"""A rank that sends itself USR2 while it computes a given step: ``stop_at_step.py RUN STEP RANK``. A real signal at an exact place.

Step 0: as soon as the handlers exist, before torch is imported.
"""

from launcher.train.stop import listen

if __name__ == "__main__":
    stop = listen()

    import os
    import signal
    import sys

    wanted, chosen = int(sys.argv[2]), os.environ["RANK"] == sys.argv[3]
    if wanted == 0 and chosen:
        os.kill(os.getpid(), signal.SIGUSR2)

    from launcher.train.live import live
    from launcher.train.order import Order

    samples = Order.samples

    def samples_and_signal(order, step):
        if step == wanted and chosen:
            os.kill(os.getpid(), signal.SIGUSR2)
        return samples(order, step)

    Order.samples = samples_and_signal
    live(sys.argv[1:2], stop)
