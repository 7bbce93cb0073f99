"""A sampling process without MindSpore, for tests of what is around it: a plain colour in a few milliseconds.

The prompt says what happens: "slow" waits between steps, "crash" ends the process, "wrong" is a mistake of the user's.
"""

import os
import sys
import time
from multiprocessing.connection import Connection

import numpy as np

from demo.messages import Finished, Phase, Picture, Step
from demo.worker import Inbox


def main(descriptor):
    connection = Connection(descriptor)
    inbox = Inbox(connection)
    while True:
        asked = inbox.requests.get()
        request = asked.request
        connection.send(Phase(asked.job, "Loading the model"))
        if "crash" in request.prompt:
            os._exit(1)
        if "wrong" in request.prompt:
            connection.send(Finished(asked.job, "failed", "no such model"))
            continue
        connection.send(Finished(asked.job, sample(asked, connection, inbox)))


def sample(asked, connection, inbox):
    request = asked.request
    for position, side in enumerate(request.sides):
        shade = request.seed % 200 if side == "base" else 255 - request.seed % 200
        pixels = np.full((request.height, request.width, 3), shade, np.uint8)
        for number in range(request.count):
            for step in range(1, request.num_inference_steps + 1):
                if inbox.is_cancelled(asked.job):
                    return "cancelled"
                time.sleep(0.1 if "slow" in request.prompt else 0)
                share = (position + (number + step / request.num_inference_steps) / request.count) / len(request.sides)
                connection.send(Step(asked.job, number, side, "base", step, request.num_inference_steps, share, pixels))
            settings = {"prompt": request.prompt, "seed": request.seed, "number": number, "process": os.getpid()}
            connection.send(Picture(asked.job, number, side, pixels, settings))
    return "done"


if __name__ == "__main__":
    main(int(sys.argv[1]))
