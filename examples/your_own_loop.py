"""A loss and a frozen teacher of tutelage in a plain PyTorch loop."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from tutelage import losses
from tutelage.data import as_batch
from tutelage.taps import Needs
from tutelage.teachers import LiveTeacher

torch.manual_seed(0)
images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
data = torch.utils.data.TensorDataset(images[:1400].float(), labels[:1400])
big, small = (nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)) for width in (256, 8))
teacher = None
for name, model in (("teacher", big), ("student", small)):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    for _ in range(30):
        for x, y in torch.utils.data.DataLoader(data, batch_size=32, shuffle=True):
            loss = losses.cross_entropy(logits := model(x), y)
            if teacher is not None:
                soft = teacher.signal(as_batch((x, y)), Needs()).dense()
                loss = 0.1 * loss + 0.9 * losses.kd(logits, soft, temperature=4.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    teacher = LiveTeacher(big)
    print(f"{name}: {(model(images[1400:].float()).argmax(1) == labels[1400:]).float().mean():.1%}")
