"""A drawing process without MindSpore, for tests of what is around it: it draws a plain colour in a few milliseconds.

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
        asked = inbox.drawings.get()
        drawing = asked.drawing
        connection.send(Phase(asked.job, "Loading the model"))
        if "crash" in drawing.prompt:
            os._exit(1)
        if "wrong" in drawing.prompt:
            connection.send(Finished(asked.job, "failed", "no such model"))
            continue
        connection.send(Finished(asked.job, draw(asked, connection, inbox)))


def draw(asked, connection, inbox):
    drawing = asked.drawing
    for position, side in enumerate(drawing.sides):
        shade = drawing.seed % 200 if side == "base" else 255 - drawing.seed % 200
        pixels = np.full((drawing.height, drawing.width, 3), shade, np.uint8)
        for number in range(drawing.count):
            for step in range(1, drawing.num_inference_steps + 1):
                if inbox.is_cancelled(asked.job):
                    return "cancelled"
                time.sleep(0.1 if "slow" in drawing.prompt else 0)
                share = (position + (number + step / drawing.num_inference_steps) / drawing.count) / len(drawing.sides)
                connection.send(Step(asked.job, number, side, "base", step, drawing.num_inference_steps, share, pixels))
            settings = {"prompt": drawing.prompt, "seed": drawing.seed, "number": number, "process": os.getpid()}
            connection.send(Picture(asked.job, number, side, pixels, settings))
    return "done"


if __name__ == "__main__":
    main(int(sys.argv[1]))
