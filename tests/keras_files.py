"""Run in a Python that has TensorFlow: writes a random MobileNetV2 in each of its formats, an input and its logits.

python keras_files.py FOLDER
"""

import os
import sys
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tensorflow as tf

SIZE = 96


def network(pictures: np.ndarray) -> keras.Model:
    keras.utils.set_random_seed(3)
    model = keras.applications.MobileNetV2(
        input_shape=(SIZE, SIZE, 3), alpha=0.35, weights=None, classes=7, classifier_activation=None
    )
    generator = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            count = layer.gamma.shape[0]
            layer.gamma.assign(1 + 0.2 * generator.standard_normal(count))
            layer.beta.assign(0.5 + 0.2 * generator.standard_normal(count))
            layer.momentum = 0.0
        elif isinstance(layer, keras.layers.Dense):
            layer.set_weights([generator.standard_normal(w.shape) for w in layer.get_weights()])
    # Statistics of these pictures: with others a network this deep would answer all pictures alike.
    model(pictures, training=True)
    return model


def main(folder: Path) -> None:
    pictures = np.random.default_rng(1).uniform(-1, 1, (4, SIZE, SIZE, 3)).astype(np.float32)
    model = network(pictures)
    np.savez(folder / "pictures.npz", pictures=pictures, logits=model.predict(pictures, verbose=0))
    model.save(folder / "m.keras")
    model.save(folder / "m.h5")
    model.save_weights(folder / "m.weights.h5")
    model.export(folder / "exported", verbose=False)
    tf.saved_model.save(model, str(folder / "saved"))
    tf.train.Checkpoint(model=model).write(str(folder / "checkpoint"))

    def samples() -> object:
        for picture in pictures:
            yield [picture[None]]

    for name, settings in {
        "float32": {},
        "float16": {"target_spec": tf.lite.TargetSpec(supported_types=[tf.float16])},
        "weights8": {},
        "int8": {"representative_dataset": samples, "inference_input_type": tf.uint8},
    }.items():
        converter = tf.lite.TFLiteConverter.from_keras_model(model)
        if name != "float32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        for key, value in settings.items():
            setattr(converter, key, value)
        (folder / f"{name}.tflite").write_bytes(converter.convert())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
