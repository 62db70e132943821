"""Words people say, by the Unicode label of the thing they mean; and which things are asked for most."""

from __future__ import annotations

import re


def _split(text: str) -> frozenset[str]:
    return frozenset(re.split(r";\s*", text.strip()))


EVERYDAY_WORDS: dict[str, tuple[str, ...]] = {
    "automobile": ("car", "red car"),
    "bicycle": ("bike",),
    "airplane": ("plane", "aeroplane"),
    "sailboat": ("boat", "sailing boat"),
    "delivery truck": ("truck", "lorry"),
    "locomotive": ("steam train", "steam locomotive"),
    "red apple": ("apple",),
    "hamburger": ("burger", "cheeseburger"),
    "french fries": ("fries", "chips"),
    "hot beverage": ("coffee", "cup of coffee", "cup of tea"),
    "beer mug": ("beer", "mug of beer"),
    "wine glass": ("wine", "glass of wine"),
    "birthday cake": ("cake",),
    "soft ice cream": ("ice cream cone",),
    "chocolate bar": ("chocolate",),
    "blossom": ("flower", "yellow flower"),
    "deciduous tree": ("tree",),
    "evergreen tree": ("pine tree", "fir tree"),
    "ear of corn": ("corn",),
    "honeybee": ("bee",),
    "lady beetle": ("ladybug", "ladybird"),
    "sauropod": ("dinosaur",),
    "T-Rex": ("tyrannosaurus",),
    "full moon": ("moon",),
    "red heart": ("heart",),
    "soccer ball": ("ball", "football"),
    "musical keyboard": ("piano",),
    "mobile phone": ("phone", "smartphone"),
    "desktop computer": ("computer",),
    "television": ("tv",),
    "mantelpiece clock": ("clock",),
    "closed book": ("book", "red book"),
    "locked": ("padlock", "lock"),
    "wrapped gift": ("gift", "present"),
    "gem stone": ("diamond", "gem"),
    "top hat": ("hat",),
    "t-shirt": ("shirt",),
    "running shoe": ("shoe", "sneaker"),
    "pile of poo": ("poop",),
    "clown face": ("clown",),
    "teddy bear": ("teddy",),
    "ewe": ("sheep",),
    "doughnut": ("donut",),
    "jack-o-lantern": ("pumpkin", "halloween pumpkin"),
    "Santa Claus": ("santa",),
    "flying saucer": ("ufo", "spaceship"),
    "tangerine": ("orange fruit", "mandarin"),
    "cheese wedge": ("cheese",),
    "cherries": ("cherry",),
    "blueberries": ("blueberry",),
    "kiwi fruit": ("kiwi",),
    "glass of milk": ("milk",),
    "light bulb": ("bulb", "lamp"),
    "passenger ship": ("cruise ship",),
    "fire engine": ("fire truck",),
    "racing car": ("race car", "formula one car"),
    "sport utility vehicle": ("suv", "blue car"),
    "motorcycle": ("motorbike",),
    "water wave": ("wave",),
    "high voltage": ("lightning bolt", "lightning"),
    "droplet": ("drop of water", "water drop"),
    "baby chick": ("chick",),
    "rabbit": ("bunny",),
    "horse": ("brown horse",),
    "spider web": ("cobweb",),
    "snow-capped mountain": ("snowy mountain",),
    "ringed planet": ("planet", "saturn"),
    "globe showing Europe-Africa": ("earth", "globe"),
    "shooting star": ("falling star",),
    "grinning face with big eyes": ("smiley", "smiley face", "happy face"),
    "smiling face with sunglasses": ("cool face",),
    "smiling face with heart-eyes": ("face with heart eyes",),
    "loudly crying face": ("crying smiley",),
    "frowning face": ("sad face",),
    "angry face": ("mad face",),
    "magnifying glass tilted left": ("magnifying glass",),
    "graduation cap": ("mortarboard",),
    "billed cap": ("baseball cap",),
    "high-heeled shoe": ("high heel",),
    "kitchen knife": ("knife",),
    "Christmas tree": ("xmas tree",),
    "artist palette": ("palette", "paint palette"),
    "video game": ("game controller", "gamepad"),
    "game die": ("dice", "die"),
    "couch and lamp": ("couch", "sofa"),
    "dollar banknote": ("money", "banknote"),
    "four leaf clover": ("clover",),
    "mage": ("wizard",),
    "merperson": ("mermaid",),
    "tropical fish": ("yellow fish",),
    "crescent moon": ("moon crescent",),
    "camera": ("photo camera",),
    "wastebasket": ("trash can", "bin"),
    "sun": ("bright sun",),
    "police car": ("cop car",),
}

FAVOURITES = _split(
    """
    dog;cat;fox;lion;tiger;wolf;bear;polar bear;panda;koala;monkey;gorilla;elephant;giraffe;zebra;horse;unicorn;
    deer;cow;pig;goat;camel;mouse;hamster;hedgehog;bat;otter;kangaroo;chicken;rooster;bird;penguin;eagle;duck;
    swan;owl;
    flamingo;peacock;parrot;frog;crocodile;turtle;lizard;snake;dragon;whale;dolphin;seal;fish;shark;octopus;crab;
    lobster;squid;snail;butterfly;bug;ant;spider;scorpion;dog face;cat face;rabbit face;tiger face;black cat;
    raccoon;cactus;palm tree;mushroom;sunflower;rose;tulip;cherry blossom;bouquet;maple leaf;potted plant;
    grapes;watermelon;lemon;banana;pineapple;mango;green apple;pear;peach;strawberry;tomato;coconut;avocado;
    eggplant;potato;carrot;broccoli;onion;bread;croissant;pretzel;pancakes;waffle;bacon;pizza;hot dog;
    sandwich;taco;burrito;
    egg;cooking;popcorn;sushi;ice cream;cookie;cupcake;pie;candy;lollipop;honey pot;teapot;bubble tea;spaghetti;
    mountain;volcano;desert island;house;castle;church;tent;ferris wheel;train;bus;ambulance;taxi;tractor;
    motor scooter;skateboard;anchor;ship;helicopter;rocket;hourglass done;alarm clock;watch;star;glowing star;cloud;
    tornado;rainbow;umbrella;snowflake;snowman;fire;balloon;party popper;trophy;basketball;tennis;baseball;bowling;
    kite;crystal ball;magic wand;puzzle piece;glasses;sunglasses;jeans;dress;backpack;crown;ring;bell;headphone;
    radio;saxophone;trumpet;guitar;violin;drum;laptop;key;hammer;axe;dagger;bomb;bow and arrow;shield;gear;magnet;
    microscope;telescope;pill;door;chair;bed;bathtub;toothbrush;shopping cart;moai;envelope;package;pencil;crayon;
    scissors;pushpin;candle;scroll;newspaper;coin;money bag;credit card;globe with meridians;world map;compass;
    grinning face;winking face;thinking face;sleeping face;nerd face;partying face;cowboy hat face;skull;ghost;
    alien;alien monster;robot;ogre;broken heart;sparkles;collision;dizzy;astronaut;ninja;vampire;zombie;fairy;
    genie;baby;
    soccer ball;paintbrush;microphone;kick scooter;roller coaster;police car light;treasure chest;flashlight;socks
    """
)

# Not what a first picture should show, or too close to another drawing to be told apart.
UNWANTED = _split(
    """
    middle finger;cigarette;syringe;coffin;headstone;funeral urn;love hotel;bikini;briefs;drop of blood;kaaba;
    magnifying glass tilted right;oncoming bus;oncoming police car;oncoming taxi;oncoming automobile;
    front-facing baby chick;camera with flash;muted speaker;speaker low volume;speaker medium volume;
    closed mailbox with lowered flag;open mailbox with lowered flag;waxing gibbous moon;waning gibbous moon;
    first quarter moon;last quarter moon;waxing crescent moon;waning crescent moon;new moon;incoming envelope;
    mobile phone with arrow;bell with slash;hourglass not done;sun behind small cloud;sun behind large cloud;
    globe showing Americas;globe showing Asia-Australia;tram car;spiral calendar;index finger pointing up;
    low battery;small airplane;videocassette;film frames;page facing up;right anger bubble;left speech bubble;
    chart increasing with yen;locked with pen;love letter;umbrella on ground;two-hump camel
    """
)
