"""Perplexity of plain prose, which the project's authors wrote for this."""

from __future__ import annotations

import random

from pm_llm.tasks.base import Example

PROSE = [
    paragraph.replace("\n", " ").strip()
    for paragraph in """
The ferry leaves the harbour at six, when the water is still grey and the gulls have not yet begun to quarrel.
A handful of people stand at the rail with their collars turned up. By the time the sun clears the hills, the
town behind them has become a thin line of roofs, and the first cups of coffee are being passed around.

Bread needs little more than flour, water, salt and time. The dough is mixed in the evening, folded a few
times, and left in a cool place until the next day. What happens overnight cannot be hurried: yeast and
bacteria slowly turn starch into gas and acid, and the taste of the loaf depends on how long they are allowed
to work.

A library is more than a room full of books. It is a place where nobody has to buy anything in order to stay,
where a student can find silence and an old man can find company. When a town closes its library to save
money, it often discovers years later what it has given up.

Rivers do not run in straight lines for long. Wherever the bank is a little softer, the current eats into it,
and on the opposite side sand and gravel settle. The bend grows until the river breaks through its narrow neck
during a flood and leaves the old loop behind as a quiet lake.

Learning an instrument as an adult asks for patience above all. The fingers are slow, the ear is quicker than
the hand, and every mistake is heard. Those who keep going usually do so because they have stopped comparing
themselves with children, and practise for twenty minutes each day instead of three hours on Sunday.

The committee met on Tuesday to discuss the budget for the coming year. Several members argued that the roads
should be repaired before any new building was planned. Others pointed out that the school had been promised a
larger hall. After two hours the decision was put off until the next meeting.

Vaccines work by showing the body a harmless part of a germ. The immune system learns to recognise it and
keeps cells that remember. When the real germ arrives later, the answer comes within hours rather than days,
and most people never notice that they were exposed to it.

In autumn the swallows gather on the wires above the village street. For a week or two they seem unable to
make up their minds. Then, one morning, the wires are empty, and only the nests under the eaves show that they
were ever there. They will be back in April, most of them to the very same barn.

A good map leaves things out. If every tree and every fence were drawn, nobody could find the road. The art of
the map maker lies in deciding what a walker, a driver or a sailor needs to know, and in drawing just that so
clearly that it can be read in the rain.

When a program fails only now and then, the cause is often hidden in the order in which things happen. Two
parts read the same value, each adds one to it, and each writes back its own result. Most of the time nothing
is lost. Under load, one of the two additions disappears without a trace.

My grandmother kept her recipes in a tin box, written on the backs of old envelopes. Few of them gave amounts.
She wrote that the batter should be like cream and the oven like a summer afternoon, and left it to us to find
out what she had meant.

The price of wheat rose again last month after a dry spring in several of the main growing regions. Traders
expect the harvest to be about a tenth smaller than usual. Millers have enough grain in store for the moment,
but bakers say that they will have to raise prices before winter.

Glass is made of sand, soda and lime, melted together at a heat that turns them into something like thick
honey. While it is hot it can be blown, drawn and bent. It must then be cooled slowly, sometimes for days,
because glass that cools too quickly carries a tension that may break it years later.

The train was late, as it usually was on Fridays. People had spread out along the platform with their bags,
and a boy was counting the pigeons on the roof of the waiting room. When the loudspeaker finally announced the
arrival, nobody believed it until the lights appeared in the tunnel.

Earthworms have neither eyes nor ears, yet they notice light and the slightest trembling of the ground. They
pull fallen leaves into their tunnels and turn them into dark crumbs of soil. A field with many worms soaks up
heavy rain that would run off a field without them.

To change a tyre, park on firm ground and put the brake on. Loosen the nuts a little while the wheel still
stands on the road. Then raise the car with the jack, take the nuts off, and lift the wheel away. Put the
spare wheel on, turn the nuts by hand, lower the car and tighten them crosswise.

Chess players speak of a quiet move when nothing is taken and no check is given. Beginners overlook such
moves, because they look for threats. Masters fear them most of all: a rook that slides one square to the side
may decide a game that ten exchanges could not.

The old theatre was built of wood, and everyone in town had a story about it. It had survived two fires and a
flood. When the new owner announced that it would become a garage, three hundred people stood in the square on
a cold evening and sang until the mayor came out.

Sound travels faster in water than in air, and farther. Whales make use of this: their low calls cross whole
oceans at a certain depth, where layers of warm and cold water guide the waves like a pipe. The noise of ships
fills the same depths today, and the whales have to call louder.

Contracts are read when something has gone wrong. That is why the dull clauses matter: who pays if the goods
arrive late, which court decides, how long each side may take to answer a letter. A page that nobody looked at
on the day of signing can be worth more than all the others.

Snow had fallen during the night, and the tracks of a fox led straight across the garden to the compost heap.
It had dug a little, found nothing, and gone on along the hedge. At the gate the prints of a cat joined them,
and for a few steps the two had walked side by side.

A pendulum of a given length swings at the same pace whether it swings wide or narrow, as long as the swing is
not too wide. This small fact made clocks possible that were wrong by seconds a day rather than by a quarter
of an hour, and sailors, astronomers and train drivers came to depend on it.

She had learned to swim in the lake, where the water was brown and the bottom could not be seen. Pools seemed
strange to her afterwards, too bright and too warm. Even as an old woman she went down to the jetty each June,
held her breath, and stepped off the end without testing the water.

Most of what we throw away is neither dangerous nor worthless, only mixed. Paper can be pulped, glass melted
and metal cast again and again, provided that somebody has sorted them. The cheapest place to do that is the
kitchen, before the tins have met the tea leaves.
""".split("\n\n")
]
ROWS, NEW_TOKENS, SCORER = len(PROSE), 1, "perplexity"


def make(rng: random.Random, number: int) -> Example:
    """A paragraph."""
    return Example("", PROSE[number], kind="text")
