# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Deterministic dialogues in which a user states, changes and asks for facts.

Splits: "train" (no held-out pair, open names of the training part), "seen" (training pairs, list values only),
"unseen" (asked pairs are held out), "open" (open attributes with names that never occur in training), "new" (the
other attributes, days and months apart, with values that are in no list and never occur in training).
Training uses seeds >= 1_000_000 and tests seeds < 100_000; the split is part of the random seed.
Only `Random.random` is used, whose sequence is the same in every Python version.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypedDict
from zlib import crc32

UNKNOWN_ANSWER = "You have not told me that yet."
# to a statement, to a question, and to the part of an introduction that is about no attribute
FOREIGN_ANSWERS = ("I cannot keep that.", "I do not know that, I cannot keep it.", "I cannot keep the rest.")
SPLITS = ("train", "seen", "unseen", "open", "new")
HELD_OUT_SHARE = 0.12
FIRST_TRAINING_SEED = 1_000_000
# more questions than in a test dialogue: they are what trains the memory
MIX: dict[str, Any] = {
    "p_state": 0.33,
    "p_overwrite": 0.12,
    "p_ask": 0.47,
    "p_chat": 0.08,
    "p_unknown": 0.15,
    "p_open": 0.6,
    "p_new": 0.0,
    "p_introduction": 0.0,
    "p_foreign": 0.0,
}

# fmt: off

def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _choices(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


VALUES: dict[str, tuple[str, ...]] = {
    "person": _words(
        "Anna Peter Maria Thomas Julia David Emma Paul Sarah Daniel Laura Martin Sofia James Alice Robert Nina "
        "Victor Helen Simon Clara Oscar Irene Hugo"),
    "surname": _words(
        "Miller Baker Carter Johnson Wilson Parker Cooper Schmidt Novak Garcia Rossi Kim Tanaka Jensen Murphy "
        "Fischer Lopez Turner"),
    "pet": _words(
        "Buddy Fluffy Shadow Snowy Daisy Charlie Molly Oreo Simba Coco Ginger Smokey Patch Sunny Rusty Biscuit "
        "Misty Felix Nala Toby Bruno Ruby"),
    "thing": _words(
        "Falcon Phoenix Aurora Comet Orion Titan Atlas Neptune Voyager Horizon Thunder Mercury Pegasus Eclipse "
        "Summit Beacon"),
    "word": _words(
        "lantern marble thimble pumpkin velvet compass feather rocket blanket crystal hammer window pocket anchor "
        "candle mirror"),
    "place": _words(
        "Maple Elmwood Riverside Oakfield Hillcrest Ashford Brookside Kingston Milton Lakeview Westbury Greenfield "
        "Stonebridge Highgate Fairview Linden"),
    "city": (*_words(
        "Oslo Lima Paris Tokyo Berlin Madrid Rome Cairo Dublin Vienna Prague Boston Sydney Toronto Athens Lisbon "
        "Warsaw Seoul Delhi Nairobi Geneva Chicago"), "New York", "Cape Town"),
    "colour": _words(
        "green blue red yellow purple pink black white grey brown silver gold turquoise violet beige navy"),
    "food": (*_words(
        "pizza pasta rice sushi curry salad fish chicken cheese bread tacos noodles beans potatoes mushrooms "
        "pancakes lasagna dumplings"), "tomato soup", "fried eggs"),
    "drink": (*_words(
        "coffee tea milk water lemonade cocoa cola wine beer cider espresso soda kefir kombucha"),
        "ginger ale", "orange juice"),
    "job": (*_words(
        "nurse doctor pilot farmer lawyer plumber carpenter engineer accountant architect electrician journalist "
        "gardener waiter librarian actor tailor butcher chemist"), "police officer"),
    "hobby": _words(
        "tennis chess football swimming jogging painting knitting climbing fishing sailing dancing yoga hockey "
        "cycling skiing badminton"),
    "instrument": _words(
        "piano guitar violin cello flute trumpet harp clarinet saxophone trombone banjo accordion oboe tuba organ "
        "ukulele"),
    "month": _words(
        "January February March April May June July August September October November December"),
    "weekday": _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "number": _words("3 7 9 11 14 18 21 23 27 36 42 58 64 77 85 91"),
    "language": _words(
        "Spanish French German Italian Japanese Arabic Korean Russian Polish Dutch Greek Turkish Swedish Hindi "
        "Hungarian Portuguese"),
    "animal": _words(
        "elephants lions snakes spiders bears wolves bats owls foxes monkeys sharks geese frogs crocodiles penguins "
        "bees"),
}
OPEN_TYPES = ("person", "surname", "pet", "thing", "word", "place")

# Values of the other types that training never sees; numbers are drawn. Days and months have no others.
NEW_REAL_VALUES: dict[str, tuple[str, ...]] = {
    "city": _words(
        "Leipzig Hamburg Krakow Munich Valencia Bristol Denver Houston Helsinki Ottawa Zurich Lyon Dallas Naples "
        "Mumbai Jakarta"),
    "colour": _words("teal maroon crimson scarlet lavender magenta amber khaki copper coral mauve bronze"),
    "food": _words(
        "ramen risotto falafel hummus burgers omelette sausages stew goulash kebab paella lentils gnocchi porridge"),
    "drink": _words("matcha whisky vodka rum lassi prosecco chai buttermilk sherry brandy mead tonic"),
    "job": _words(
        "welder usher barber surgeon cashier sailor tiler miner translator astronaut cook optician roofer vicar"),
    "hobby": _words(
        "origami surfing archery gardening pottery rowing boxing hiking golf karate rugby juggling fencing judo"),
    "instrument": _words("zither lute harmonica viola mandolin cornet bassoon lyre sitar marimba xylophone recorder"),
    "language": _words("Finnish Danish Thai Czech Hebrew Latin Welsh Irish Basque Bengali Persian Urdu Swahili"),
    "animal": _words(
        "wasps rats tigers pandas whales dolphins camels rabbits hamsters eagles otters goats moths crabs"),
}
NEW_TYPES = (*NEW_REAL_VALUES, "number")

OPEN_REAL_NAMES: tuple[str, ...] = _words(
    "Rex Bella Mochi Ziggy Bartholomew Xanthe Pixel Luna Max Rocky Bailey Duke Zeus Apollo Thor Odin Loki Freya "
    "Willow Hazel Olive Pepper Cookie Peanut Waffles Pickles Nacho Tofu Kiwi Mango Noodle Bandit Gizmo Scout Ranger "
    "Ace Bear Teddy Winston Otis Louie Gus Hank Frankie Jasper Milo Leo Archie Finn Ollie Sasha Roxy Lola Zoe Chloe "
    "Stella Penny Rosie Maggie Sadie Lucy Abby Ellie Piper Ivy Nova Athena Juno Iris Cleo Dexter Diesel Boomer Tank "
    "Moose Marley Ziva Quincy Xavier Yusuf Zara Amir Fatima Ingrid Bjorn Sven Astrid Magnus Nikolai Olga Dmitri "
    "Katarina Mateo Lucia Diego Camila Joaquin Ximena Priya Arjun Ananya Ravi Mei Hiroshi Yuki Kenji Sakura Akira "
    "Chidi Amara Kwame Zuri Imani Thabo Liam Noah Olivia Sophia Ethan Mason Logan Aiden Jackson Harper Evelyn Abigail "
    "Gabriel Isaac Nathan Caleb Gertrude Mildred Ebenezer Cornelius Agatha Percival Beatrix Leopold Wilhelmina "
    "Octavia Thaddeus Zelda Mario Yoshi Kirby Frodo Bilbo Gandalf Merlin Avalon Camelot Narnia Brighton Cambridge "
    "Dakota Savannah Phoebe Denali Sahara Congo Havana Quito Bogota Kyoto Osaka Zagreb Vilnius Tallinn Riga Bergen "
    "Malmo Turin Verona Seville Granada Porto Nebula Quasar Pulsar Cosmo Neutron Proton Bagel Pretzel Muffin "
    "Cupcake Marshmallow Zigzag Jigsaw Quartz Topaz Onyx Indigo Sphinx Wombat Walrus Platypus")
# fmt: on


@dataclass(frozen=True)
class Attribute:
    """One thing that can be told; `{v}` is the value, `{av}` the value with its article."""

    name: str
    value_type: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    noun_phrases: tuple[str, ...]
    changes: tuple[str, ...] = ()

    @property
    def is_open(self) -> bool:
        return self.value_type in OPEN_TYPES

    @property
    def values(self) -> tuple[str, ...]:
        return VALUES[self.value_type]


# value type, {attribute: noun}, statements, questions, answers, noun phrases, statements of a change
_NAMED_STATEMENTS = (
    "My {s} is called {v}.|My {s}'s name is {v}.|The name of my {s} is {v}.|My {s} is named {v}."
    "|I have a {s} called {v}."
    "|{v} is the name of my {s}."
)
_NAMED_QUESTIONS = "What is my {s} called?|What's my {s}'s name?|What is the name of my {s}?"
_NAMED_ANSWERS = "Your {s} is called {v}.|Your {s}'s name is {v}."
_NAMED_PHRASES = "my {s}'s name|the name of my {s}"
_NEW_NAMED = "My new {s} is called {v}.|I have a new {s} called {v}."
# fmt: off
_GROUPS: tuple[tuple[str, dict[str, str], str, str, str, str, str], ...] = (
    ("person", {"name": "name"},
     "My name is {v}.|I am {v}.|You can call me {v}.|People call me {v}.|I am called {v}.",
     "What is my name?|What's my name?|What am I called?|Who am I?|What do people call me?",
     "Your name is {v}.|You are called {v}.", "my name|what I am called", "I changed my name to {v}."),
    ("person", {"sister": "sister", "brother": "brother", "friend": "best friend", "boss": "boss"},
     _NAMED_STATEMENTS + "|{v} is my {s}.", _NAMED_QUESTIONS + "|Who is my {s}?", _NAMED_ANSWERS, _NAMED_PHRASES,
     "My {s} goes by {v} now.|From now on my {s} is called {v}."),
    ("surname", {"neighbour": "neighbour", "teacher": "teacher"},
     _NAMED_STATEMENTS + "|{v} is my {s}.", _NAMED_QUESTIONS + "|Who is my {s}?", _NAMED_ANSWERS, _NAMED_PHRASES,
     _NEW_NAMED),
    ("pet", {"dog": "dog", "cat": "cat", "horse": "horse"},
     _NAMED_STATEMENTS + "|We named our {s} {v}.|We have a {s}, and we call it {v}.",
     _NAMED_QUESTIONS + "|What did we name our {s}?"
     "|What do I call my {s}?", _NAMED_ANSWERS, _NAMED_PHRASES, _NEW_NAMED),
    ("thing", {"project": "project", "boat": "boat", "team": "team"},
     _NAMED_STATEMENTS + "|We named our {s} {v}.", _NAMED_QUESTIONS + "|What did we name our {s}?",
     _NAMED_ANSWERS, _NAMED_PHRASES, _NEW_NAMED + "|We renamed our {s} to {v}."),
    ("word", {"password": "password", "code_word": "code word"},
     "My {s} is {v}.|The {s} is {v}.|I use {v} as my {s}.|I chose {v} as my {s}.|I set my {s} to {v}.",
     "What is my {s}?|What's my {s}?|What is the {s}?|Which word is my {s}?",
     "Your {s} is {v}.", "my {s}|the {s}", "I changed my {s} to {v}.|My new {s} is {v}."),
    ("place", {"street": "street", "village": "village"},
     "My {s} is called {v}.|The name of my {s} is {v}.|Our {s} is called {v}.|I grew up in a {s} called {v}."
     "|My {s}'s name is {v}.",
     "What is my {s} called?|What's my {s}'s name?|What is the name of my {s}?|What is our {s} called?",
     _NAMED_ANSWERS, _NAMED_PHRASES, "They renamed my {s} to {v}."),
    ("city", {"home_city": ""},
     "I live in {v}.|My home is in {v}.|I am living in {v}.|We live in {v}.|My flat is in {v}.",
     "Where do I live?|Which city do I live in?|In which city is my home?|Where is my home?|What city am I living in?",
     "You live in {v}.", "where I live|which city I live in", "I moved to {v}.|We moved to {v}."),
    ("city", {"birth_city": ""},
     "I was born in {v}.|My place of birth is {v}.|My birthplace is {v}.|I come from {v}, I was born there.",
     "Where was I born?|In which city was I born?|What is my birthplace?|Which city was I born in?",
     "You were born in {v}.", "where I was born|my birthplace", "In fact I was born in {v}."),
    ("city", {"work_city": ""},
     "I work in {v}.|My office is in {v}.|My job is based in {v}.|I go to work in {v}.",
     "Where do I work?|In which city do I work?|Where is my office?|Which city do I work in?",
     "You work in {v}.", "where I work|where my office is", "My office moved to {v}."),
    ("city", {"holiday_city": ""},
     "My next holiday is in {v}.|I am going to {v} on holiday.|I will spend my holiday in {v}."
     "|We booked a holiday in {v}.",
     "Where is my next holiday?|Where am I going on holiday?|Where will I spend my holiday?"
     "|Which city am I visiting on holiday?",
     "Your next holiday is in {v}.", "where my next holiday is|where I am going on holiday",
     "We will go to {v} on holiday instead."),
    ("colour", {"favourite_colour": ""},
     "My favourite colour is {v}.|I like {v} best of all colours.|The colour I love most is {v}."
     "|My best colour is {v}.",
     "What is my favourite colour?|Which colour do I like best?|What colour do I love most?"
     "|What's my favourite colour?",
     "Your favourite colour is {v}.", "my favourite colour|which colour I like best",
     "My new favourite colour is {v}."),
    ("colour", {"car_colour": "car", "door_colour": "front door", "bike_colour": "bike"},
     "My {s} is {v}.|I have {av} {s}.|The colour of my {s} is {v}.|I painted my {s} {v}.|We have {av} {s}.",
     "What colour is my {s}?|Which colour is my {s}?|What is the colour of my {s}?|What colour does my {s} have?",
     "Your {s} is {v}.", "the colour of my {s}|what colour my {s} is", "My new {s} is {v}.|I repainted my {s} {v}."),
    ("food", {"favourite_food": ""},
     "My favourite food is {v}.|I love eating {v}.|I like {v} more than any other food.|The best food for me is {v}.",
     "What is my favourite food?|Which food do I like best?|What do I love eating?|What's my favourite food?",
     "Your favourite food is {v}.", "my favourite food|which food I like best", "My new favourite food is {v}."),
    ("food", {"disliked_food": ""},
     "I do not like {v}.|I never eat {v}.|I can't stand {v}.|The food I hate is {v}.|I hate eating {v}.",
     "Which food do I hate?|What do I never eat?|Which food do I not like?|What food can't I stand?",
     "You do not like {v}.", "which food I hate|what I never eat", "The food I hate now is {v}."),
    ("food", {"dinner": ""},
     "I am cooking {v} tonight.|Tonight we will have {v}.|We are having {v} for dinner."
     "|There is {v} for dinner tonight.",
     "What am I cooking tonight?|What will we eat tonight?|What is for dinner tonight?|What are we having for dinner?",
     "Tonight you will have {v}.", "what I am cooking tonight|what we have for dinner",
     "We will have {v} tonight instead."),
    ("drink", {"morning_drink": ""},
     "I drink {v} in the morning.|Every morning I drink {v}.|My morning drink is {v}.|I start the day with {v}.",
     "What do I drink in the morning?|What is my morning drink?|What do I start the day with?"
     "|What do I drink every morning?",
     "In the morning you drink {v}.", "my morning drink|what I drink in the morning", "My new morning drink is {v}."),
    ("drink", {"evening_drink": ""},
     "I drink {v} in the evening.|Every evening I drink {v}.|My evening drink is {v}.|I end the day with {v}.",
     "What do I drink in the evening?|What is my evening drink?|What do I end the day with?"
     "|What do I drink every evening?",
     "In the evening you drink {v}.", "my evening drink|what I drink in the evening", "My new evening drink is {v}."),
    ("job", {"job": ""},
     "I work as {av}.|I am {av}.|My job is being {av}.|I earn my living as {av}.|By profession I am {av}.",
     "What is my job?|What do I do for a living?|What do I work as?|What's my job?|What is my profession?",
     "You work as {av}.", "my job|my profession", "I changed my job and became {av}.|I became {av}."),
    ("job", {"partner_job": ""},
     "My partner is {av}.|My partner works as {av}.|My partner's job is being {av}."
     "|My partner earns a living as {av}.",
     "What is my partner's job?|What does my partner do?|What does my partner work as?"
     "|What's my partner's profession?",
     "Your partner works as {av}.", "my partner's job|what my partner does", "My partner became {av}."),
    ("job", {"dream_job": ""},
     "I want to become {av}.|One day I want to be {av}.|My dream is to become {av}.|I dream of being {av}.",
     "What do I want to become?|What is my dream job?|What's my dream job?|What do I dream of being?",
     "You want to become {av}.", "my dream job|what I want to become", "My new dream is to become {av}."),
    ("hobby", {"hobby": ""},
     "My hobby is {v}.|I enjoy {v} in my free time.|In my free time I do some {v}.|My favourite hobby is {v}.",
     "What is my hobby?|What do I do in my free time?|Which hobby do I have?|What's my hobby?",
     "Your hobby is {v}.", "my hobby|what I do in my free time", "My new hobby is {v}."),
    ("hobby", {"daughter_hobby": "daughter", "son_hobby": "son"},
     "My {s}'s hobby is {v}.|My {s} loves {v}.|The hobby of my {s} is {v}.|My {s} is into {v}.|My {s} enjoys {v}.",
     "What is my {s}'s hobby?|What does my {s} love?|Which hobby does my {s} have?|What does my {s} enjoy?",
     "Your {s}'s hobby is {v}.", "my {s}'s hobby|the hobby of my {s}", "My {s}'s new hobby is {v}."),
    ("instrument", {"instrument": ""},
     "I play the {v}.|My instrument is the {v}.|I am learning the {v}.|The instrument I play is the {v}.",
     "Which instrument do I play?|What instrument do I play?|What is my instrument?|What's my instrument?",
     "You play the {v}.", "my instrument|which instrument I play", "I switched to the {v}."),
    ("instrument", {"cousin_instrument": "cousin"},
     "My {s} plays the {v}.|My {s}'s instrument is the {v}.|The instrument my {s} plays is the {v}."
     "|My {s} is learning the {v}.",
     "Which instrument does my {s} play?|What instrument does my {s} play?|What is my {s}'s instrument?"
     "|What does my {s} play?",
     "Your {s} plays the {v}.", "my {s}'s instrument|which instrument my {s} plays", "My {s} switched to the {v}."),
    ("month", {"birthday_month": ""},
     "My birthday is in {v}.|I have my birthday in {v}.|I celebrate my birthday in {v}.|My birthday month is {v}.",
     "When is my birthday?|In which month is my birthday?|What is my birthday month?|When do I celebrate my birthday?",
     "Your birthday is in {v}.", "when my birthday is|my birthday month", "In fact my birthday is in {v}."),
    ("month", {"wedding_month": ""},
     "My wedding is in {v}.|I am getting married in {v}.|We will marry in {v}.|The month of our wedding is {v}.",
     "When is my wedding?|In which month is my wedding?|When will we marry?|When am I getting married?",
     "Your wedding is in {v}.", "when my wedding is|the month of my wedding", "We moved the wedding to {v}."),
    ("weekday", {"gym_day": ""},
     "My gym day is {v}.|I go to the gym on {v}.|My training at the gym is on {v}.|I have gym on {v}.",
     "When do I go to the gym?|What is my gym day?|On which day do I have gym?|Which day is my gym day?",
     "You go to the gym on {v}.", "my gym day|when I go to the gym", "I moved my gym day to {v}."),
    ("weekday", {"dentist_day": ""},
     "I see the dentist on {v}.|My dentist appointment is on {v}.|I have to go to the dentist on {v}."
     "|The dentist expects me on {v}.",
     "When is my dentist appointment?|When do I see the dentist?|On which day do I see the dentist?"
     "|When does the dentist expect me?",
     "You see the dentist on {v}.", "when I see the dentist|the day of my dentist appointment",
     "My dentist appointment moved to {v}."),
    ("number", {"house_number": "house number", "lucky_number": "lucky number"},
     "My {s} is {v}.|The number {v} is my {s}.|I have {v} as my {s}.|For me the {s} is {v}.",
     "What is my {s}?|What's my {s}?|Which {s} do I have?|Which number is my {s}?",
     "Your {s} is {v}.", "my {s}", "My new {s} is {v}."),
    ("language", {"learning_language": ""},
     "I am learning {v}.|I study {v} at the moment.|The language I am learning is {v}.|I take lessons in {v}.",
     "Which language am I learning?|What language do I study?|Which language do I take lessons in?"
     "|What language am I learning?",
     "You are learning {v}.", "which language I am learning|the language I study", "I started to learn {v} instead."),
    ("language", {"home_language": ""},
     "We speak {v} at home.|At home we speak {v}.|The language of my family is {v}.|My family speaks {v}.",
     "Which language do we speak at home?|What does my family speak?|What is the language of my family?"
     "|What language do we speak at home?",
     "Your family speaks {v}.", "which language we speak at home|the language of my family",
     "We switched to {v} at home."),
    ("animal", {"favourite_animal": ""},
     "My favourite animals are {v}.|I love {v} most of all animals.|The animals I like best are {v}."
     "|I really love {v}.",
     "What are my favourite animals?|Which animals do I like best?|Which animals do I love?"
     "|What animals do I love most?",
     "Your favourite animals are {v}.", "my favourite animals|which animals I like best",
     "My new favourite animals are {v}."),
    ("animal", {"feared_animal": ""},
     "I am afraid of {v}.|I am scared of {v}.|The animals that scare me are {v}.|I fear {v}.",
     "Which animals am I afraid of?|What am I afraid of?|Which animals scare me?|What am I scared of?",
     "You are afraid of {v}.", "which animals scare me|what I am afraid of", "The animals that scare me now are {v}."),
)

_CHAT_GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Hello!|Hi!|Hi there.|Good morning.|Good evening.|Hello again.|Hey, nice to see you.",
     ("Hello, nice to talk to you.", "Hello, how can I help you?")),
    ("How are you?|How are you today?|How do you feel?|How is it going?|Are you okay?|Is everything fine?",
     ("I am fine, thank you.",)),
    ("Thanks.|Thank you.|Thank you very much.|Thanks a lot.|Thanks for your help.|That was helpful."
     "|You are very kind.",
     ("You are welcome.",)),
    ("Tell me something nice.|Say something nice.|Cheer me up.|Make me smile.|I need a kind word.",
     ("You are doing really well.", "Today is going to be a good day.")),
    ("Tell me a joke.|Make me laugh.|Do you know a joke?|Say something funny.",
     ("My memory is small, but it never loses its keys.",)),
    ("The weather is lovely.|The sun is out.|What a beautiful day.|It is so warm outside.",
     ("That sounds wonderful, enjoy it.",)),
    ("It is raining again.|The weather is awful.|It is cold outside.|There is a storm coming.",
     ("Then it is best to stay inside.",)),
    ("I am tired.|I did not sleep well.|I need a break.|It was a long day.|I have a headache.",
     ("You should get some rest.",)),
    ("I am bored.|I have nothing to do.|What should I do now?", ("You could go for a walk.",)),
    ("I am happy.|I feel great.|Everything went well.|I had a good day."
     "|I got good news.", ("I am glad to hear that.",)),
    ("I am sad.|I feel lonely.|I am worried.|I had a bad day.", ("I am sorry to hear that.",)),
    ("Who are you?|What are you?|Are you a robot?|Are you human?", ("I am a small language model with a memory.",)),
    ("What can you do?|How can you help me?|What are you good at?", ("I can remember what you tell me.",)),
    ("Can you remember things?|Do you have a memory?"
     "|Is your memory good?", ("Yes, I keep what you tell me in mind.",)),
    ("Goodbye.|Bye.|See you later.|Good night.|I have to go.|See you soon.", ("Goodbye, see you soon.",)),
    ("Okay.|All right.|I see.|Sounds good.|Great.", ("Is there anything else?",)),
    ("Wait a moment.|One second, please.|Give me a minute.|I will be right back.", ("Take your time.",)),
    ("What do you think?|Do you agree?|Is that a good idea?", ("I think that is a good idea.",)),
)

# Phrases as people type them, by attribute: statements, questions. Training never sees the last of
# each list: test dialogues have no other.
_NAMED_CASUAL = (
    "I've got a {s} called {v}.|Our {s} is called {v}.|The {s} is called {v}.|My {s} is {v}.|My {s}'s called {v}.",
    "How is my {s} called?|What was my {s}'s name?|What was the name of my {s}?|What's my {s} called?"
    "|What's the name of my {s}?",
)
_COLOUR_CASUAL = (
    "My {s}'s colour is {v}.|We painted our {s} {v}.|I bought {av} {s}.|I've got {av} {s}.|The {s} is {v}."
    "|The color of my {s} is {v}.",
    "What color is my {s}?|What's the colour of my {s}?|What colour was my {s}?|Is my {s} blue or red?"
    "|What's the color of my {s}?",
)
_CHILD_CASUAL = (
    "My {s} likes {v}.|My {s} does {v}.|My {s} is a fan of {v}.|My {s}'s favourite hobby is {v}."
    "|My {s} does a lot of {v}.",
    "What does my {s} like?|What is the hobby of my {s}?|What's my {s}'s hobby?|What is my {s} into?"
    "|What does my {s} do in the free time?",
)
_NUMBER_CASUAL = (
    "I chose {v} as my {s}.|{v} is my {s}.|My {s} is number {v}.|My {s}: {v}.|The {s} is {v}.",
    "What number is my {s}?|What was my {s}?|What is the {s}?|What's the {s}?",
)
_WORD_CASUAL = (
    "My {s}: {v}.|The {s} for today is {v}.|The {s} is the word {v}.|My {s} is the word {v}.|{v} is my {s}.",
    "What was my {s}?|Tell me the {s}.|What did I choose as my {s}?|What's the {s}?|Say the {s}.",
)
_CASUAL_GROUPS: dict[str, tuple[str, str]] = {
    "name": (
        "I'm {v}.|This is {v}.|{v} is my name.|My friends call me {v}.|Call me {v}.|The name is {v}.|My name's {v}."
        "|{v} here.|They call me {v}.",
        "What's my name again?|What was my name?|Say my name.|How am I called?|Do you know who I am?"
        "|Who am I again?|What is my name again?|Can you say my name?"),
    **dict.fromkeys(("sister", "brother", "friend", "boss", "neighbour", "teacher"), (
        "I have a {s}, {v}.|My {s} {v} is nice.|" + _NAMED_CASUAL[0], "Who's my {s}?|" + _NAMED_CASUAL[1])),
    **dict.fromkeys(("dog", "cat", "horse"), (
        "I got a {s} named {v}.|My {s} {v} is asleep.|{v} is my {s}.|" + _NAMED_CASUAL[0], _NAMED_CASUAL[1])),
    **dict.fromkeys(("project", "boat", "team"), (
        "I started a {s} called {v}.|" + _NAMED_CASUAL[0], _NAMED_CASUAL[1])),
    **dict.fromkeys(("street", "village"), (
        "I live in a {s} called {v}.|The {s} I live in is {v}.|" + _NAMED_CASUAL[0], _NAMED_CASUAL[1])),
    **dict.fromkeys(("password", "code_word"), _WORD_CASUAL),
    "home_city": (
        "I'm from {v}.|I'm living in {v}.|I'm based in {v}.|My house is in {v}.|I have an apartment in {v}."
        "|My hometown is {v}.|I am from {v}.|I live in the city of {v}.|We're from {v}.|My apartment is in {v}.",
        "Where am I from?|What is my city?|What city do I live in?|Where do we live?|What's my hometown?"
        "|Where's my home?|What city am I from?|Which city am I from?|What is my hometown?|Where am I living?"),
    "birth_city": (
        "I was born and raised in {v}.|My birth city is {v}.|The city I was born in is {v}.",
        "What city was I born in?|Where was I born and raised?|What's my birthplace?"
        "|Do you know which city I was born in?"),
    "work_city": (
        "I'm working in {v}.|My workplace is in {v}.|The company I work for is in {v}.|Our office is in {v}.",
        "Where is my workplace?|What city do I work in?|Where's my office?|Where am I working?"),
    "holiday_city": (
        "I'm going on holiday to {v}.|I'm travelling to {v}.|My vacation is in {v}.|I'm flying to {v} soon."
        "|We are going to {v} on vacation.|I'm going to {v} on holiday.",
        "Where am I travelling to?|Where am I flying to?|Where is my vacation?|Where do I go on holiday?"
        "|Where's my next holiday?|Where am I going on vacation?"),
    "favourite_colour": (
        "My favorite color is {v}.|I really like the colour {v}.|I love the colour {v}.|My favourite color is {v}."
        "|I love the color {v}.",
        "What is my favorite color?|What's my favorite color?|What colour do I like?|Which colour is my favourite?"
        "|What color do I like best?|Which color do I love?|What color do I like?"),
    **dict.fromkeys(("car_colour", "door_colour", "bike_colour"), _COLOUR_CASUAL),
    "favourite_food": (
        "I like {v}.|I like eating {v}.|I like to eat {v}.|My favorite food is {v}.|I love to eat {v}."
        "|I really like {v}.|My favourite dish is {v}.|I'd eat {v} every day.",
        "What do I like to eat?|What food do I like?|What is my favorite food?|What's my favorite food?"
        "|Which food do I love?|What do I like eating?|Do you know what I like to eat?|What do I like?"
        "|What is my favourite dish?"),
    "disliked_food": (
        "I don't like {v}.|I hate {v}.|I really don't like {v}.|I dislike {v}.|I don't eat {v}."
        "|I don't like eating {v}.",
        "What don't I like?|What food do I hate?|What do I hate eating?|Which food do I dislike?|What don't I eat?"
        "|What do I hate?"),
    "dinner": (
        "I'm cooking {v} tonight.|I'm making {v} for dinner.|Dinner tonight is {v}.|We're having {v} tonight."
        "|Tonight I'm cooking {v}.",
        "What's for dinner?|What am I making for dinner?|What's for dinner tonight?|What do we eat tonight?"
        "|What is for dinner?"),
    "morning_drink": (
        "In the morning I drink {v}.|I need {v} in the morning.|I always drink {v} in the morning."
        "|I drink {v} for breakfast.|In the mornings I have {v}.",
        "What do I drink in the mornings?|What do I need in the morning?|What do I drink for breakfast?"
        "|What do I always drink in the morning?"),
    "evening_drink": (
        "In the evening I drink {v}.|I always drink {v} in the evening.|I drink {v} at night."
        "|In the evenings I have {v}.",
        "What do I drink in the evenings?|What do I drink at night?|What do I always drink in the evening?"),
    "job": (
        "I'm {av}.|I'm working as {av}.|My profession is {v}.|I have a job as {av}."
        "|I work as {av} in a small company.|My job is {v}.|I am working as {av}.|I'm {av} by profession.",
        "What do I do?|What's my profession?|What is my occupation?|How do I earn my living?"
        "|What am I by profession?|What's my occupation?|What job do I have?|Which job do I have?"),
    "partner_job": (
        "My partner's {av}.|My partner is working as {av}.|My partner's job is {v}.|My partner has a job as {av}.",
        "What is my partner's profession?|What is my partner working as?|What's my partner's job?"
        "|What job does my partner have?"),
    "dream_job": (
        "I'd like to be {av}.|I would love to become {av}.|My dream job is {v}.|I hope to be {av} one day."
        "|I want to be {av}.|I'd love to be {av}.",
        "What would I like to be?|What do I want to be?|What job do I dream of?|What do I hope to be?"
        "|What would I like to become?"),
    "hobby": (
        "I love doing {v}.|I spend my free time on {v}.|I really enjoy {v}.|I enjoy {v}.|I'm into {v}."
        "|I do a lot of {v}.|My hobbies are {v}.",
        "What do I enjoy?|What are my hobbies?|What's my favourite hobby?|What do I like to do?|What am I into?"
        "|What do I enjoy in my free time?|What do I like doing?"),
    **dict.fromkeys(("daughter_hobby", "son_hobby"), _CHILD_CASUAL),
    "instrument": (
        "I can play the {v}.|I'm playing the {v}.|I'm learning the {v}.|I play {v}.|I'm learning to play the {v}.",
        "What do I play?|Which instrument am I learning?|What instrument am I learning?|What can I play?"
        "|Which instrument can I play?"),
    "cousin_instrument": (
        "My {s} can play the {v}.|My {s} plays {v}.|My {s}'s playing the {v}.|My {s} likes to play the {v}.",
        "Which instrument can my {s} play?|What's my {s}'s instrument?|What can my {s} play?"),
    "birthday_month": (
        "I was born in {v}.|My birthday's in {v}.|I have a birthday in {v}.|My birth month is {v}."
        "|It's my birthday in {v}.",
        "When was I born?|When's my birthday?|What month is my birthday in?|Which month was I born in?"
        "|In which month was I born?|When do I have my birthday?"),
    "wedding_month": (
        "I'm getting married in {v}.|Our wedding is in {v}.|We're getting married in {v}.|I'll marry in {v}.",
        "When is our wedding?|When do I marry?|What month is my wedding in?|When's my wedding?"
        "|When are we getting married?"),
    "gym_day": (
        "I go to the gym every {v}.|I work out on {v}.|I train on {v}.|I'm at the gym on {v}.|I do sports on {v}.",
        "When do I train?|What day do I go to the gym?|When do I work out?|Which day do I go to the gym?"
        "|When am I at the gym?"),
    "dentist_day": (
        "I have a dentist appointment on {v}.|I'm seeing the dentist on {v}.|I'm going to the dentist on {v}."
        "|I've got an appointment with the dentist on {v}.",
        "When do I have to go to the dentist?|What day is my dentist appointment?|When's my dentist appointment?"
        "|Which day do I see the dentist?|When am I seeing the dentist?"),
    **dict.fromkeys(("house_number", "lucky_number"), _NUMBER_CASUAL),
    "learning_language": (
        "I'm learning {v}.|I'm studying {v}.|I want to learn {v}.|I take {v} lessons.|I am studying {v}.",
        "What language am I studying?|Which language do I study?|Which language do I want to learn?"
        "|What language do I learn?"),
    "home_language": (
        "I speak {v}.|My mother tongue is {v}.|My native language is {v}.|We talk in {v} at home.|My language is {v}.",
        "Which language do I speak?|What language do I speak?|What is my mother tongue?|What's my native language?"
        "|What do we speak at home?|What is my native language?"),
    "favourite_animal": (
        "I love {v}.|My favorite animals are {v}.|I think {v} are great.|The best animals are {v}.|I'm a fan of {v}.",
        "What are my favorite animals?|Which animals do I like?|What animals do I like?|What's my favourite animal?"
        "|Which animal do I like best?|What animals do I love?"),
    "feared_animal": (
        "I'm afraid of {v}.|I'm scared of {v}.|I'm really scared of {v}.|I am terrified of {v}.",
        "What do I fear?|What scares me?|What animals am I afraid of?|What animals scare me?"
        "|Which animals do I fear?"),
}
_CASUAL_PREFIXES = _choices(
    "Hi! |Hello! |Hi, |Hello, |Hey, |Hey! |Hi there! |Good morning! |You know, |Remember: |Remember that "
    "|Let me tell you: |I want you to know that |Did you know that |Okay, |Yes, |Thanks. |Nice to meet you. "
)
_CASUAL_ASK_PREFIXES = _choices(
    "Okay, |And |Hi! |Hello, |Now, |Right, |Well, |Good. |Great, |Please, |Thanks. |Do you remember: "
)
# what no attribute is about is taken note of, or is beyond the demo
BEYOND_ANSWER = "That is beyond me, I am a small model."
_CASUAL_CHAT_GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("What time is it?|What day is it today?|How old are you?|How old am I?|Where are you from?"
     "|What is the date today?|How many cats do I have?|How many brothers do I have?|How many children do I have?"
     "|How many books do I have?|What is two plus two?|What is {n} plus {n}?|What is {n} times {n}?"
     "|Who is the president?|Who wrote this book?|What is the capital of France?|What is the capital of Germany?"
     "|Who is the king of England?|How tall am I?|Can you write a poem?|Write me a story.|Sing a song."
     "|Can you sing?|Translate this sentence.|Tell me a story.|What is the weather like?"
     "|What's the weather like today?|How high is that tower?|Why is the sky blue?|What is the meaning of life?"
     "|Can you help me with my homework?|Do you like music?|What is your favourite colour?"
     "|What is your favorite food?|What did I eat yesterday?|What did I do last week?|How much does it cost?"
     "|How far is the moon?|What is a computer?|What is love?|Where is the nearest station?"
     "|Which film should I watch?|What should I eat?|Can you recommend a book?|Who won the match?|When was the war?"
     "|Explain that to me.|What does that mean?|Can you write code?|Write a letter.|Give me a recipe.|Who made you?"
     "|How do I get to the airport?|What is the news today?|Do you believe in god?|Are you alive?|Can you see me?"
     "|What is my age?|What is my phone number?|How many people live here?|What is my mother's name?"
     "|Who is my father?|What did you say?|Why?|How?|Really?|What else?|Where is my key?|When does the train leave?"
     "|Do you love me?",
     (BEYOND_ANSWER,)),
    ("I am {n} years old.|I'm {n} years old.|I turned {n} last week.|I have {n} cats.|I have {n} children."
     "|I have {n} books.|I have two cats.|I have three brothers.|I've got two sisters.|I have a big family."
     "|I have no brothers.|My car broke down.|I bought a new phone.|I went to the cinema."
     "|I watched a film yesterday.|I am {n} centimetres tall.|I study at the university.|My mother is ill."
     "|My father is in the garden.|I need to buy bread and milk.|I have a meeting at {n}.|The train leaves at {n}."
     "|My phone number is {n}{n}.|I paid {n} euros for it.|It cost {n} dollars.|I lost my key."
     "|My key is in the drawer.|I read a good book.|I am reading a book about history.|I am at work."
     "|I am going shopping.|I was at a concert.|We had a party yesterday.|I need a new coat.|The film was boring."
     "|My phone is broken.|I am on the train.|I will be late.|My neighbours are loud.|I cooked for everybody."
     "|I am hungry.|I want to go home.|I am in love.|I am married.|I am single.|I have a cold."
     "|I have to work tomorrow.|I was in London.",
     ("Thanks for telling me.",)),
    ("Nice to meet you.|Hello, nice to meet you.|Pleased to meet you.|Hi, nice to meet you!|Hello, my friend.|Hey!"
     "|Hey there!",
     ("Hello, nice to talk to you.",)),
    ("Do you remember me?|What do you know about me?|What do you remember?|What can you remember?"
     "|What have I told you?|Do you remember what I said?|What did I tell you?",
     ("Ask me about one thing, and I will tell you.",)),
    ("Cool.|Nice.|Perfect.|Good.|Very good.|Wonderful.|That is right.|That's right!|Correct.|Exactly.|Yes."
     "|Well done!|Right.",
     ("Is there anything else?",)),
    ("No.|That is wrong.|That's wrong.|That's not right.|That is not true.|Wrong.|No, that is wrong.",
     ("I am sorry, please tell me again.",)),
    ("Help.|Help me.|Can you help me?|What now?|I have a question.|Can I ask you something?|Listen.",
     ("I can remember what you tell me.",)),
)
# Two of a kind, told at once: both names are the value.
_PAIR_NOUNS = ("dog", "cat", "horse", "sister", "brother")
_PAIR_PHRASES = (
    "I have two {s}s, {v}.|My {s}s are called {v}.|I have two {s}s called {v}.|We have two {s}s, {v}."
    "|I have two {s}s: {v}.|I've got two {s}s, {v}.|My two {s}s are called {v}.|I have two {s}s named {v}."
    "|The names of my {s}s are {v}.|My {s}s are {v}.",
    "What are my {s}s called?|What are the names of my {s}s?|What are my {s}s' names?|What is my {s} called?"
    "|Who are my {s}s?",
    "Your {s}s are called {v}.", "my {s}s' names|the names of my {s}s", "My {s}s are called {v} now.",
)

# Introductions of two or three statements, by number; then whole sentences, whose places name attributes. Training
# sees the first string of each pair and tests the second.
_FRAMES: dict[int, tuple[str, str]] = {
    2: ("{0} and {1}.|{0}, and {1}.|{0}. {1}.|{0}, {1}.|{0}, also {1}.|{0} and also {1}.",
        "{0}. Also, {1}.|{0}; {1}.|{0}, plus {1}."),
    3: ("{0}, {1} and {2}.|{0}, {1}, and {2}.|{0}. {1}. {2}.|{0} and {1}. {2}.|{0}. {1} and {2}.|{0}, {1}, {2}.",
        "{0} and {1}, and {2}.|{0}; {1}; {2}.|{0}. Also, {1} and {2}."),
}
_SENTENCES = (
    "I'm {name}, {a job} from {home_city}.|I'm {name} from {home_city}.|I am {name} from {home_city}."
    "|Call me {name}, I'm from {home_city}.|{name} here, from {home_city}.|I'm {name}, and I'm {a job}."
    "|My name is {name}, I am {a job} and I live in {home_city}.|I'm {name}, my dog is {dog} and my cat is {cat}."
    "|I have a dog called {dog} and a cat called {cat}.|I have a cat, {cat}, and a dog, {dog}."
    "|I have a dog, {dog}, and a cat, {cat}.|I have two cats, {two cat}, and a dog, {dog}."
    "|I have two dogs, {two dog}, and a cat called {cat}.|My sister is {sister} and my brother is {brother}."
    "|I have a sister called {sister} and a brother called {brother}."
    "|I have a brother, {brother}, and a sister, {sister}."
    "|I was born in {birth_city} but I live in {home_city}.|I was born in {birth_city} and live in {home_city} now."
    "|I live in {home_city} but I work in {work_city}.|I live in {home_city} and work in {work_city}."
    "|I live in {home_city} and work as {a job}.|I work as {a job} in {work_city}."
    "|I'm {name}, born in {birth_city}, living in {home_city}.|I love {favourite_food} but I hate {disliked_food}."
    "|I love eating {favourite_food} but not {disliked_food}.|I'm {a job}, but I want to become {a dream_job}."
    "|I drink {morning_drink} in the morning and {evening_drink} in the evening."
    "|I play the {instrument} and I'm learning {learning_language}.|I play the {instrument} and enjoy {hobby}."
    "|My favourite colour is {favourite_colour} and my favourite food is {favourite_food}."
    "|I like {favourite_colour} best of all colours and {favourite_food} more than any other food."
    "|I'm {a job} and my partner is {a partner_job}.|My daughter loves {daughter_hobby} and my son loves {son_hobby}."
    "|My daughter is into {daughter_hobby}, my son is into {son_hobby}."
    "|My car is {car_colour} and my bike is {bike_colour}."
    "|I have {a car_colour} car and {a bike_colour} bike.|My boss is {boss} and my best friend is {friend}."
    "|I love {favourite_animal} but I'm afraid of {feared_animal}.|I live in {home_city} with my dog {dog}."
    "|We speak {home_language} at home and I'm learning {learning_language}.|I live in {home_city} with my cat {cat}."
    "|My house number is {house_number} and my lucky number is {lucky_number}."
    "|I live in {home_city} with my dog, {dog}."
    "|I go to the gym on {gym_day} and see the dentist on {dentist_day}."
    "|My birthday is in {birthday_month} and my wedding is in {wedding_month}.",
    "I'm {name}, {a job} living in {home_city}.|My brother's name is {brother} and my sister's is {sister}."
    "|I start the day with {morning_drink} and end it with {evening_drink}.|I'm {name} and I have a dog, {dog}."
    "|I can't stand {disliked_food}, but I love eating {favourite_food}.|I'm {name}, and this is my dog {dog}."
    "|Born in {birth_city}, I live in {home_city} now.|My boss is called {boss}, my best friend {friend}."
    "|My job is being {a job}, my hobby is {hobby}.|My dog is called {dog}, my cat {cat}.",
)

# What no attribute is about: kinds of values, nouns of training, nouns of tests, statements, questions, noun phrases.
_PEOPLE = (
    "wife|husband|mother|father|mum|dad|mom|uncle|aunt|grandmother|grandfather|grandma|grandpa|nephew|roommate|colleague"
    "|girlfriend|boyfriend|baby|grandson|landlord|manager|doctor|nanny|trainer|coach|mentor|client|stepmother|godfather"
    "|brother-in-law|student|assistant|lawyer|plumber|pen friend|ex-wife|twin sister|pupil|fiancee|child|twin|singer",
    "niece|granddaughter|flatmate|classmate|stepfather|godmother|sister-in-law|dentist|hairdresser|tenant|guest|cleaner"
    "|mother-in-law|fiance|co-worker|half-brother",
)
# names of these are told, other things of theirs have no place
_KNOWN_PEOPLE = "sister|brother|best friend|boss|neighbour|teacher"
_EVENTS = (
    "exam|lesson|interview|haircut|meeting|flight|party|visit|move|graduation|trip|concert|piano lesson|day off|test"
    "|doctor's appointment|mother's birthday|sister's birthday|match|race|show|course|operation|anniversary|date"
    "|wife's birthday|dog's birthday|brother's wedding|delivery|deadline|yoga class",
    "rehearsal|driving test|conference|check-up|football match|husband's birthday|reunion|surgery|swimming lesson"
    "|vet's appointment|audition|father's birthday|friend's wedding|performance",
)
_FOREIGN_GROUPS: tuple[tuple[str, str, str, str, str, str], ...] = (
    ("person", _PEOPLE[0] + "|partner|daughter|son|cousin|second sister|old boss|first teacher", _PEOPLE[1],
     _NAMED_STATEMENTS + "|{v} is my {s}.|My {s} is {v}.|I have a {s}, {v}.|Our {s} is called {v}."
     "|My {s}'s called {v}.|I am married to {v}.|I live with my {s} {v}.",
     _NAMED_QUESTIONS + "|Who is my {s}?|Who's my {s}?|What was my {s}'s name?", _NAMED_PHRASES),
    ("city person surname thing place word food drink animal",
     "film|movie|book|song|band|singer|actor|actress|writer|game|season|flower|tree|sport|shop|river|planet|cheese|fruit"
     "|dessert|cake|subject|museum|poet|painter|dance|car|restaurant|country|city|show|series|drink|vegetable|beer"
     "|football team|toy|island|hero|day|month|word|smell|director|club|shoe|painting|hotel|park|mountain",
     "bridge|album|author|opera|comic|insect|waterfall|soup|sandwich|composer|footballer|cartoon|podcast|castle|beach|musician"
     "|ice cream|play|magazine|superhero",
     "My favourite {s} is {v}.|The {s} I like best is {v}.|My favorite {s} is {v}.|{v} is my favourite {s}."
     "|The best {s} is {v}.|The {s} I love most is {v}.|My best {s} is {v}.|I think {v} is the best {s}.",
     "What is my favourite {s}?|What's my favourite {s}?|Which {s} do I like best?|What is my favorite {s}?"
     "|What {s} do I love most?|Which {s} is my favourite?",
     "my favourite {s}|which {s} I like best|my favorite {s}"),
    ("pet",
     "hamster|rabbit|parrot|goldfish|tortoise|pony|cow|goat|sheep|snake|lizard|mouse|rat|pig|turtle|donkey|chicken|hen"
     "|budgie|spider|fish|bird|kitten|puppy|old dog|first cat",
     "guinea pig|canary|ferret|llama|duck|gecko|cockatoo|frog|camel|second horse",
     _NAMED_STATEMENTS + "|We named our {s} {v}.|I have a {s}, and I call it {v}.|My {s} is {v}."
     "|Our {s} is called {v}.|I've got a {s} called {v}.|I have a {s}, {v}.",
     _NAMED_QUESTIONS + "|What did we name our {s}?|What do I call my {s}?|What was my {s}'s name?", _NAMED_PHRASES),
    ("thing place",
     "company|school|band|blog|van|robot|guitar|garden|farm|restaurant|shop|hotel|university|church|choir|bank"
     "|plane|ship|computer|phone|house|bus stop|river|lake|park|pub|gym|newspaper|startup"
     "|bicycle|school team|district|island|county|book|song|film|poem|baby's doll|teddy bear",
     "college|orchestra|bakery|truck|tablet|hospital|gallery|podcast|bridge|bar|cinema|beach"
     "|train station|magazine|theatre|novel|drone|airline",
     _NAMED_STATEMENTS + "|We named our {s} {v}.|Our {s} is called {v}.|The {s} is called {v}.|My {s} is {v}.",
     _NAMED_QUESTIONS + "|What did we name our {s}?|What is our {s} called?|Which {s} is mine?", _NAMED_PHRASES),
    ("city surname place thing person",
     "surname|last name|middle name|nickname|username|motto|email|website|star sign|religion|maiden name|country"
     "|nationality|postcode|degree|subject|party|address",
     "second name|stage name|family name|login|first word|pen name|title|major|account name|hashtag",
     "My {s} is {v}.|The {s} is {v}.|I use {v} as my {s}.|I chose {v} as my {s}.|{v} is my {s}.|My {s}: {v}.",
     "What is my {s}?|What's my {s}?|What is the {s}?|Which {s} do I have?|What was my {s}?", "my {s}|the {s}"),
    ("colour",
     "hat|coat|house|sofa|umbrella|kitchen|roof|jacket|dress|bag|phone|laptop|carpet|lamp|van|scooter|shirt|hair|chair"
     "|bed|wall|pen|cup|garden door|back door|skirt|bathroom|tie|garage",
     "scarf|truck|tent|bookcase|desk|fence|helmet|sweater|bedroom|suitcase|curtain|motorbike"
     "|letterbox|gate",
     "My {s} is {v}.|I have {av} {s}.|The colour of my {s} is {v}.|I painted my {s} {v}.|We have {av} {s}."
     "|My {s}'s colour is {v}.|I bought {av} {s}.|I've got {av} {s}.|The {s} is {v}.",
     "What colour is my {s}?|Which colour is my {s}?|What is the colour of my {s}?|What color is my {s}?",
     "the colour of my {s}|what colour my {s} is"),
    ("hobby", f"{_PEOPLE[0]}|partner|cousin|{_KNOWN_PEOPLE}", _PEOPLE[1],
     "My {s}'s hobby is {v}.|My {s} loves {v}.|The hobby of my {s} is {v}.|My {s} is into {v}.|My {s} enjoys {v}."
     "|My {s} likes {v}.",
     "What is my {s}'s hobby?|What does my {s} love?|Which hobby does my {s} have?|What does my {s} enjoy?",
     "my {s}'s hobby|the hobby of my {s}"),
    ("instrument", f"{_PEOPLE[0]}|partner|daughter|son|{_KNOWN_PEOPLE}", _PEOPLE[1],
     "My {s} plays the {v}.|My {s}'s instrument is the {v}.|My {s} is learning the {v}.|My {s} plays {v}.",
     "Which instrument does my {s} play?|What is my {s}'s instrument?|What does my {s} play?",
     "my {s}'s instrument|which instrument my {s} plays"),
    ("job", f"{_PEOPLE[0]}|daughter|son|cousin|{_KNOWN_PEOPLE}", _PEOPLE[1],
     "My {s} is {av}.|My {s} works as {av}.|My {s}'s job is being {av}.|My {s} is working as {av}.|My {s} was {av}.",
     "What is my {s}'s job?|What does my {s} do?|What does my {s} work as?|What's my {s}'s profession?",
     "my {s}'s job|what my {s} does"),
    ("city", f"{_PEOPLE[0]}|partner|daughter|son|cousin|{_KNOWN_PEOPLE}", _PEOPLE[1],
     "My {s} lives in {v}.|My {s} comes from {v}.|My {s} was born in {v}.|My {s} works in {v}.|My {s} is from {v}."
     "|My {s} moved to {v}.|I met my {s} in {v}.",
     "Where does my {s} live?|Where is my {s} from?|Where was my {s} born?|Which city does my {s} live in?",
     "where my {s} lives|where my {s} was born"),
    ("language", f"{_PEOPLE[0]}|partner|daughter|son|cousin|{_KNOWN_PEOPLE}", _PEOPLE[1],
     "My {s} speaks {v}.|My {s} is learning {v}.|My {s}'s native language is {v}.|I speak {v} with my {s}.",
     "Which language does my {s} speak?|What does my {s} speak?|What language is my {s} learning?",
     "which language my {s} speaks|my {s}'s language"),
    ("food drink colour animal", f"{_PEOPLE[0]}|partner|cousin|{_KNOWN_PEOPLE}|dog|cat|horse", _PEOPLE[1],
     "My {s} likes {v}.|My {s} hates {v}.|My {s} loves {v}.|My {s} does not like {v}.|My {s} prefers {v}."
     "|The favourite thing of my {s} is {v}.",
     "What does my {s} like?|What does my {s} hate?|What does my {s} prefer?|What does my {s} not like?",
     "what my {s} likes|what my {s} hates"),
    ("food", "breakfast|lunch|tea|a snack|Christmas|supper|my birthday", "brunch|Easter|a treat|the picnic",
     "For {s} I eat {v}.|I had {v} for {s}.|I always eat {v} for {s}.|We have {v} for {s}.|I will cook {v} for {s}.",
     "What do I eat for {s}?|What did I have for {s}?|What do we have for {s}?", "what I eat for {s}"),
    ("drink", "lunch|work|parties|noon|the weekend", "New Year|the beach|dinner parties",
     "I drink {v} at {s}.|At {s} I drink {v}.|I like to drink {v} at {s}.", "What do I drink at {s}?",
     "what I drink at {s}"),
    ("food animal surname thing place",
     "work for|drive|support|study at|vote for|own|wear|collect|read|listen to|watch|admire|follow|use|sell|build"
     "|write|teach|miss|know|cook for|dream about|travel by|think about|play with|pray to|write to|bake",
     "repair|breed|trade|paint|worship|read about|work with|carry|pay for|photograph",
     "I {s} {v}.|I often {s} {v}.|I {s} {v} every day.|I really {s} {v}.|We {s} {v}.|I always {s} {v}.",
     "What do I {s}?|Who do I {s}?|What do I often {s}?|What do we {s}?|What do I always {s}?",
     "what I {s}|what we {s}"),
    ("number",
     "shoe size|flat number|pin|bus number|room number|locker number|seat number|weight|height|account number|floor"
     "|flight number|street number|door code|sister's age|dog's age|shirt number|grade|salary|rent|zip code|score",
     "dress size|desk number|train number|ticket number|gate number|hat size|cat's age|gate code|table number|licence",
     "My {s} is {v}.|The number {v} is my {s}.|I have {v} as my {s}.|For me the {s} is {v}."
     "|{v} is my {s}.|The {s} is {v}.",
     "What is my {s}?|What's my {s}?|Which {s} do I have?|Which number is my {s}?|What was my {s}?", "my {s}"),
    ("weekday", *_EVENTS,
     "My {s} is on {v}.|I have my {s} on {v}.|The {s} is on {v}.|My {s} will be on {v}.",
     "When is my {s}?|On which day is my {s}?|When do I have my {s}?|When is the {s}?|Which day is my {s}?",
     "when my {s} is|the day of my {s}"),
    ("month", *_EVENTS,
     "My {s} is in {v}.|I have my {s} in {v}.|The {s} is in {v}.|My {s} will be in {v}.",
     "When is my {s}?|In which month is my {s}?|When do I have my {s}?|When is the {s}?|Which month is my {s} in?",
     "when my {s} is|the month of my {s}"),
    ("surname thing", "car|phone|bike|laptop|camera|watch|computer|guitar|printer|fridge|van",
     "tablet|motorbike|piano|truck|radio",
     "My {s} is a {v}.|I have a {v} {s}.|My {s} is made by {v}.|The brand of my {s} is {v}.|I bought a {v} {s}.",
     "Which {s} do I have?|What brand is my {s}?|Who made my {s}?|What kind of {s} do I have?", "the brand of my {s}"),
    ("surname thing person", "company|firm|bank|team|club|party|school", "charity|agency|foundation|hospital",
     "I work for a {s} called {v}.|I am at a {s} called {v}.|I support the {s} {v}.|The {s} I like is {v}."
     "|The {s} I work for is {v}.|I belong to the {s} {v}.",
     "Which {s} do I work for?|Which {s} do I support?|Which {s} do I like?|Which {s} do I belong to?",
     "which {s} I work for|which {s} I support"),
)
# fmt: on
CHAT: tuple[tuple[str, tuple[str, ...]], ...] = tuple(
    (query, answers) for queries, answers in _CHAT_GROUPS for query in queries.split("|")
)
_CASUAL_CHAT: tuple[tuple[str, tuple[str, ...]], ...] = tuple(
    (query, answers) for queries, answers in _CASUAL_CHAT_GROUPS for query in queries.split("|")
)

_STATE_PREFIXES = _choices(
    "By the way, |Just so you know, |Well, |Also, |Please remember: |Oh, |I should mention that |Note that "
)
_CHANGE_PREFIXES = _choices("Actually, |Correction: |No wait, |Sorry, |Update: |Things have changed: |Oh, ")
_STATE_SUFFIXES = (" Please remember that.", " Keep it in mind.", " Can you remember that?")
_ASK_PREFIXES = _choices("Tell me, |Hey, |So, |By the way, |One question: |Quick question: |Please tell me: ")
_ASK_PHRASES = _choices(
    "Do you remember {np}?|Do you know {np}?|Can you tell me {np}?|Please tell me {np}.|Tell me {np}.|I forgot {np}."
    "|Do you recall {np}?|Do you still know {np}?|Can you remember {np}?"
)
_REPEATS = ("Got it, ", "Okay, ", "Noted, ", "Thanks, ")
_CHANGE_REPEATS = ("Got it, now ", "Okay, now ", "Noted, now ", "Thanks, now ")
_PLAIN_ACKS = ("Okay, I will remember that.", "Thanks for telling me.", "I will keep that in mind.")
_CHANGE_ACKS = ("Okay, I have updated that.", "Thanks for telling me.", "I will keep that in mind.")


def _build_attributes() -> dict[str, Attribute]:
    attributes = {}
    for value_type, nouns, *patterns in _GROUPS:
        for name, noun in nouns.items():
            filled = [_choices(pattern.replace("{s}", noun)) for pattern in patterns]
            attributes[name] = Attribute(name, value_type, *filled)
    return attributes


ATTRIBUTES: dict[str, Attribute] = _build_attributes()


def _casual(is_test: bool) -> dict[str, list[tuple[str, ...]]]:
    """Casual statements and questions of each attribute, for training or for tests."""
    nouns = {name: noun for _, nouns, *_ in _GROUPS for name, noun in nouns.items()}
    found = {}
    for name, group in _CASUAL_GROUPS.items():
        lists = [_choices(phrases.replace("{s}", nouns[name])) for phrases in group]
        found[name] = [phrases[-1:] if is_test else phrases[:-1] for phrases in lists]
    return found


_CASUAL = {is_test: _casual(is_test) for is_test in (False, True)}


def _plural(name: str) -> Attribute:
    noun = {**_GROUPS[1][1], **_GROUPS[3][1]}[name]
    filled = [_choices(pattern.replace("{s}", noun)) for pattern in _PAIR_PHRASES]
    return Attribute(name, ATTRIBUTES[name].value_type, *filled)


PLURALS: dict[str, Attribute] = {name: _plural(name) for name in _PAIR_NOUNS}


@dataclass(frozen=True)
class Foreign:
    """A kind of thing that is told though no attribute is about it; `{s}` is its noun."""

    value_types: tuple[str, ...]
    nouns: tuple[tuple[str, ...], tuple[str, ...]]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    noun_phrases: tuple[str, ...]


FOREIGN: tuple[Foreign, ...] = tuple(
    Foreign(_words(types), (_choices(train), _choices(test)), *(_choices(phrases) for phrases in rest))
    for types, train, test, *rest in _FOREIGN_GROUPS
)


# "my aunt's dog" is none of the user's own
_OWNED_NOUNS = {
    kind: _choices("|".join(nouns.values())) for kind, nouns, *_ in _GROUPS[1:] if "" not in nouns.values()
}


def _sentence(text: str) -> tuple[tuple[str, ...], str]:
    """The places of a sentence ("name", "a job", "two cat"), and the sentence as `DialogueWriter.query` fills it."""
    places = tuple(re.findall(r"{([\w ]+)}", text))
    marks = iter(
        ("{&}" * (index > 0) + ("{av}" if place.startswith("a ") else "{v}")) for index, place in enumerate(places)
    )
    return places, re.sub(r"{[\w ]+}", lambda _: next(marks), text)


_SENTENCES_BY_PART = [[_sentence(text) for text in _choices(part)] for part in _SENTENCES]


def value_pairs() -> list[tuple[str, str]]:
    """All (attribute, list value) pairs, in a fixed order."""
    return [(attribute.name, value) for attribute in ATTRIBUTES.values() for value in attribute.values]


def _choose_held_out() -> frozenset[tuple[str, str]]:
    """Pairs of lowest checksum per attribute; at least one other attribute keeps each value for training."""
    owners = {kind: sum(a.value_type == kind for a in ATTRIBUTES.values()) for kind in VALUES}
    held: dict[tuple[str, str], int] = {}
    pairs = []
    for attribute in ATTRIBUTES.values():
        kind = attribute.value_type
        wanted = max(1, round(HELD_OUT_SHARE * len(attribute.values)))
        ranked = sorted(attribute.values, key=lambda value: crc32(f"{attribute.name}={value}".encode()))
        free = [value for value in ranked if held.get((kind, value), 0) < owners[kind] - 1]
        for value in free[:wanted]:
            held[kind, value] = held.get((kind, value), 0) + 1
            pairs.append((attribute.name, value))
    return frozenset(pairs)


HELD_OUT_PAIRS: frozenset[tuple[str, str]] = _choose_held_out()
_TRAIN_VALUES = {a.name: [v for v in a.values if (a.name, v) not in HELD_OUT_PAIRS] for a in ATTRIBUTES.values()}
_HELD_VALUES = {a.name: [v for v in a.values if (a.name, v) in HELD_OUT_PAIRS] for a in ATTRIBUTES.values()}
_OPEN_NAMES = tuple(a.name for a in ATTRIBUTES.values() if a.is_open)
_NEW_NAMES = tuple(a.name for a in ATTRIBUTES.values() if a.value_type in NEW_TYPES)


def _all_words() -> frozenset[str]:
    texts: list[str] = [value for values in VALUES.values() for value in values]
    for a in ATTRIBUTES.values():
        texts += a.statements + a.questions + a.answers + a.noun_phrases + a.changes
    for query, answers in CHAT:
        texts += [query, *answers]
    texts += [*_STATE_PREFIXES, *_CHANGE_PREFIXES, *_STATE_SUFFIXES, *_ASK_PREFIXES, *_ASK_PHRASES, *_CHANGE_REPEATS]
    texts += [*_PLAIN_ACKS, *_CHANGE_ACKS, UNKNOWN_ANSWER]
    return frozenset(re.findall(r"[a-z]+", " ".join(texts).lower()))


# A generated name is never a word that the dialogues use otherwise, nor (in training) a real test name.
_USED_WORDS = _all_words()
_REAL_WORDS = frozenset(name.lower() for names in (OPEN_REAL_NAMES, *NEW_REAL_VALUES.values()) for name in names)
_TAKEN = _USED_WORDS | _REAL_WORDS | frozenset(VALUES["number"])

_SIMPLE = _words("b c d f g h j k l m n p r s t v w b d l m n r s t k z q x y")
_CLUSTERS = _words("bl br ch cl cr dr fl fr gl gr kl kr ph pl pr qu sc sh sk sl sm sn sp st str sw th tr tw wh")
_VOWELS = _words("a e i o u " * 6 + "a e i o a e y y ai au ea ee ei ia ie io oa oo ou ua")
_CODAS = _words("b d f g k l m n p r s t x z ck ff ll lt mp nd ng nk nt rd rk rl rn rt sh sk ss st th tch x z")
_ENDINGS = _words(
    "a o y ie ey us el en in on er ar ix ax ox is as os ine elle etta ito ina wen ton ley bert mond ard ius ora ette "
    "wick ald ian ique zo za ka ko ki mi ro"
)
_DOUBLES = _words("bb cc dd ff gg ll mm nn pp rr ss tt zz")
_LETTERS = "aaaabbccdddeeeeeffgghhiiiijjkkllllmmmnnnnooooppqrrrrssssttttuuuvvwwxxyyzz"


def _pick(rng: Random, items: Sequence[Any]) -> Any:
    return items[int(rng.random() * len(items))]


def _onset(rng: Random) -> str:
    return _pick(rng, _CLUSTERS if rng.random() < 0.3 else _SIMPLE)


def _letters(rng: Random) -> str:
    """A word of random letters in which neither vowels nor consonants run longer than three."""
    word = ""
    for _ in range(3 + int(rng.random() * 7)):
        letter = _pick(rng, _LETTERS)
        run = word[-2:] + letter
        if len(run) == 3 and len({char in "aeiouy" for char in run}) == 1:
            letter = _pick(rng, "aeiou" if letter not in "aeiouy" else "bdgklmnprstvxz")
        word += letter
    return word


def _raw_name(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.08:
        return _letters(rng)
    start = _pick(rng, "aeiou") if rng.random() < 0.12 else _onset(rng) + _pick(rng, _VOWELS)
    if kind < 0.27:  # Rex, Finn
        return start + _pick(rng, _CODAS)
    if kind < 0.42:  # Ziggy, Bonnie
        return start + _pick(rng, _DOUBLES) + _pick(rng, ("y", "ie", "o", "a", "er", "i", "in"))
    if kind < 0.62:  # Milo, Pixel
        return start + _onset(rng) + _pick(rng, _ENDINGS)
    if kind < 0.8:  # Barton, Xanthe
        return start + _pick(rng, _CODAS) + _onset(rng) * (rng.random() < 0.3) + _pick(rng, _ENDINGS)
    word = start
    for _ in range(1 + int(rng.random() * 2)):
        word += _onset(rng) + _pick(rng, _VOWELS)
    return word + (_pick(rng, _CODAS) if rng.random() < 0.4 else "")


def is_test_name(word: str) -> bool:
    """Whether a generated name belongs to the tenth that training never sees."""
    return crc32(word.lower().encode()) % 10 == 0


def open_name(rng: Random, split: str) -> str:
    """A capitalised name of 3-9 letters; "open" and "new" draw from the test part, every other split from the rest."""
    while True:
        word = _raw_name(rng)
        if not 3 <= len(word) <= 9 or word in _USED_WORDS or word in _REAL_WORDS:
            continue
        # names that people give are short
        if len(word) > 6 and rng.random() < 0.6:
            continue
        if is_test_name(word) == (split in ("open", "new")):
            return word.capitalize()


def new_value(rng: Random, value_type: str, split: str) -> str:
    """A value that is in no list, for a type of `NEW_TYPES`; split "new" draws what training never sees."""
    if split == "new" and value_type in NEW_REAL_VALUES and rng.random() < 0.5:
        return _pick(rng, NEW_REAL_VALUES[value_type])
    while True:
        if value_type == "number":
            value = str(1 + int(rng.random() * 999))
        else:
            value = open_name(rng, split)
            value = value if value_type in ("city", "language") else value.lower()
            value = value.rstrip("s") + "s" if value_type == "animal" else value
        if value.lower() not in _TAKEN and is_test_name(value) == (split == "new"):
            return value


class Interaction(TypedDict):
    """One turn. For statements of two facts `also` holds the second; distances count turns, for questions only."""

    query: str
    answer: str
    kind: str
    attribute: str | None
    value: str | None
    also: list[tuple[str, str]]
    stale: list[str]
    distance: int | None
    distance_stated: int | None
    live_facts: int


class Dialogue(TypedDict):
    seed: int
    split: str
    interactions: list[Interaction]


@dataclass
class _Fact:
    attribute: Attribute
    value: str
    stated: int
    said: int
    stale: list[str] = field(default_factory=list)


def _lower_first(text: str) -> str:
    keep = text.startswith(("I ", "I'", "{"))
    return text if keep else text[0].lower() + text[1:]


def _joined(prefix: str, template: str) -> str:
    return prefix + (template if prefix.endswith(("! ", ". ")) else _lower_first(template))


def _with_article(value: str) -> str:
    return ("an " if value[0].lower() in "aeiou" else "a ") + value


def _fill(template: str, value: str) -> str:
    return template.replace("{av}", _with_article(value)).replace("{v}", value)


def _noisy(template: str) -> str:
    """The template as a hurried user types it; values keep their case."""
    return template.lower().replace("'", "").rstrip(".?!")


class DialogueWriter:
    """Writes one dialogue turn by turn."""

    def __init__(
        self,
        rng: Random,
        split: str,
        p_open: float,
        p_noise: float,
        max_live: int,
        only_open: bool,
        p_new: float = 0.0,
        p_casual: float = 0.0,
        p_introduction: float = 0.0,
        p_foreign: float = 0.0,
    ) -> None:
        self.p_introduction, self.p_foreign = p_introduction, p_foreign
        self.rng, self.split, self.p_open, self.p_new, self.p_noise = rng, split, p_open, p_new, p_noise
        self.p_casual, self.casual = p_casual, _CASUAL[split != "train"]
        self.names = _OPEN_NAMES if only_open else _NEW_NAMES if split == "new" else tuple(ATTRIBUTES)
        self.max_live = min(max_live, len(self.names))
        self.facts: dict[str, _Fact] = {}
        self.foreign: list[tuple[Foreign, str]] = []
        self.turn = 0

    def value_for(self, attribute: Attribute, exclude: Sequence[str] = ()) -> str:
        rng = self.rng
        if attribute in PLURALS.values():
            single = ATTRIBUTES[attribute.name]
            first = self.value_for(single)
            pair = f"{first} and {self.value_for(single, [first])}"
            return pair if pair not in exclude else self.value_for(attribute, exclude)
        if attribute.is_open and rng.random() < self.p_open:
            real = self.split == "open" and rng.random() < 0.5
            name = _pick(rng, OPEN_REAL_NAMES) if real else open_name(rng, self.split)
            name = name.lower() if attribute.value_type == "word" else name
            return name if name not in exclude else self.value_for(attribute, exclude)
        if self.p_new and attribute.value_type in NEW_TYPES and rng.random() < self.p_new:
            value = new_value(rng, attribute.value_type, self.split)
            return value if value not in exclude else self.value_for(attribute, exclude)
        pool = _TRAIN_VALUES[attribute.name]
        if self.split == "unseen" and rng.random() < 0.9:
            current = exclude[-1:]
            pool = [v for v in _HELD_VALUES[attribute.name] if v not in current] or pool
        fresh = [v for v in pool if v not in exclude] or [v for v in pool if v not in exclude[-1:]]
        return _pick(rng, fresh)

    def is_casual(self) -> bool:
        return self.p_casual > 0 and self.rng.random() < self.p_casual

    def statement(self, attribute: Attribute) -> str:
        is_casual = attribute not in PLURALS.values() and self.is_casual()
        return _pick(self.rng, self.casual[attribute.name][0] if is_casual else attribute.statements)

    def free(self) -> list[str]:
        return [name for name in self.names if name not in self.facts]

    def new_fact(self, attribute: Attribute | None = None) -> _Fact:
        attribute = attribute or ATTRIBUTES[_pick(self.rng, self.free())]
        fact = _Fact(attribute, self.value_for(attribute), self.turn, self.turn)
        self.facts[attribute.name] = fact
        return fact

    def query(self, template: str, *values: str) -> str:
        if self.rng.random() < self.p_noise:
            template = _noisy(template)
        parts = template.split("{&}")
        texts = [_fill(part, value) for part, value in zip(parts, values, strict=True)] if values else parts
        return "".join(texts)

    def state(self, p_two: float) -> Interaction:
        rng = self.rng
        facts = [self.new_fact()]
        if rng.random() < p_two and len(self.facts) < self.max_live:
            facts.append(self.new_fact())
        template = self.statement(facts[0].attribute)
        if len(facts) == 2:
            second = _lower_first(self.statement(facts[1].attribute))
            if template.startswith("I ") and second.startswith("I ") and self.is_casual():
                second = second[2:]
            template = template.rstrip(".") + " and {&}" + second
        elif self.is_casual():
            template = _joined(_pick(rng, _CASUAL_PREFIXES), template)
        elif rng.random() < 0.3:
            template = _joined(_pick(rng, _STATE_PREFIXES), template)
        elif rng.random() < 0.08:
            template += _pick(rng, _STATE_SUFFIXES)
        query = self.query(template, *(fact.value for fact in facts))
        also = [(fact.attribute.name, fact.value) for fact in facts[1:]]
        return self.turn_of(query, self.acknowledge(facts, _REPEATS, _PLAIN_ACKS), "state", facts[0], also=also)

    def introduce(self) -> Interaction:
        """Two or three facts in one turn, or one of two names, as newcomers tell them; at times with a foreign one."""
        rng, part, free, room = self.rng, int(self.split != "train"), self.free(), self.max_live - len(self.facts)
        whole = [(places, text) for places, text in _SENTENCES_BY_PART[part] if len(places) <= room]
        whole = [(places, text) for places, text in whole if all(place.split()[-1] in free for place in places)]
        if whole and rng.random() < 0.35:
            places, text = _pick(rng, whole)
            names = [(place.split()[-1], PLURALS if place.startswith("two ") else ATTRIBUTES) for place in places]
            facts = [self.new_fact(owner[name]) for name, owner in names]
            values = [fact.value for fact in facts]
        else:
            facts = self.newcomers_facts(free, room)
            told = [(self.statement(fact.attribute), fact.value) for fact in facts]
            if len(facts) < 3 and rng.random() < 0.15:
                told.insert(int(rng.random() * (len(told) + 1)), self.foreign_statement())
            text, values = self.framed([phrase for phrase, _ in told], part), [value for _, value in told]
        if rng.random() < 0.25:
            text = _joined(_pick(rng, _CASUAL_PREFIXES), text)
        query, kept = self.query(text, *values), len(values) == len(facts)
        # the answer says apart what the sentence says at once
        answer = self.acknowledge(facts, _REPEATS, ())
        also = [(fact.attribute.name, fact.value) for fact in facts[1:]]
        return self.turn_of(query, answer if kept else f"{answer} {FOREIGN_ANSWERS[2]}", "state", facts[0], also=also)

    def newcomers_facts(self, free: Sequence[str], room: int) -> list[_Fact]:
        """New facts for one sentence: often the name first, at times two of a kind."""
        rng = self.rng
        pairs, facts, wanted = [name for name in PLURALS if name in free], [], min(room, 2 + (rng.random() < 0.4))
        if "name" in free and rng.random() < 0.5:
            facts.append(self.new_fact(ATTRIBUTES["name"]))
        if pairs and len(facts) < wanted and rng.random() < 0.25:
            facts.append(self.new_fact(PLURALS[_pick(rng, pairs)]))
            wanted -= rng.random() < 0.3
        while len(facts) < wanted:
            facts.append(self.new_fact())
        return facts

    def framed(self, statements: list[str], part: int) -> str:
        """The statements as one text; a shared "I" may be said once."""
        frame = _pick(self.rng, _choices(_FRAMES[len(statements)][part])) if len(statements) > 1 else "{0}."
        elided = self.rng.random() < 0.3

        def place(match: re.Match) -> str:
            index = int(match[1])
            text = statements[index].rstrip(".")
            if match.start() and frame[match.start() - 2] != ".":
                text = _lower_first(text)
                if elided and text.startswith("I ") and statements[index - 1].startswith(("I ", "I'm ")):
                    text = text[2:]
            return "{&}" * (index > 0) + text

        return re.sub(r"{(\d)}", place, frame)

    def foreign_statement(self) -> tuple[str, str]:
        """A statement that is about no attribute, with its noun, and its value."""
        rng, (foreign, noun) = self.rng, self.foreign_kind()
        kind = _pick(rng, foreign.value_types)
        value = self.value_for(_pick(rng, [a for a in ATTRIBUTES.values() if a.value_type == kind]))
        self.foreign.append((foreign, noun))
        return _pick(rng, foreign.statements).replace("{s}", noun), value

    def foreign_kind(self) -> tuple[Foreign, str]:
        """What is said of a thing, and its noun: of the list, somebody's, or in training a word out of no list."""
        rng, part = self.rng, int(self.split != "train")
        # the first kinds are what people tell first
        foreign, choice = FOREIGN[int(len(FOREIGN) * rng.random() ** 1.5)], rng.random()
        if choice < 0.3 and part == 0:
            return foreign, open_name(rng, "train").lower()
        owned = _OWNED_NOUNS.get(foreign.value_types[0])
        if choice > 0.85 and owned:
            return foreign, f"{_pick(rng, FOREIGN[0].nouns[part])}'s {_pick(rng, owned)}"
        return foreign, _pick(rng, foreign.nouns[part])

    def tell_foreign(self) -> Interaction:
        """What no attribute is about is told or asked for, or then an attribute like it, which must be as before."""
        rng, style = self.rng, self.rng.random()
        if style < 0.4 or not self.foreign:
            told = [self.foreign_statement() for _ in range(1 + (rng.random() < 0.1))]
            phrases = [phrase for phrase, _ in told]
            template = phrases[0] if len(told) == 1 else self.framed(phrases, int(self.split != "train"))
            if rng.random() < 0.25:
                template = _joined(_pick(rng, _CASUAL_PREFIXES), template)
            turn = self.turn_of(self.query(template, *(value for _, value in told)), FOREIGN_ANSWERS[0], "foreign")
            turn["value"] = told[0][1]
            return turn
        if style < 0.7:
            types = self.foreign[-1][0].value_types
            name = _pick(rng, [a.name for a in ATTRIBUTES.values() if a.value_type in types])
            if name not in self.facts:
                return self.ask_unknown(name)
            if self.facts[name] in self.askable():
                return self.ask(self.facts[name])
        foreign, noun = _pick(rng, self.foreign) if style < 0.9 else self.foreign_kind()
        if rng.random() < 0.4:
            template = _pick(rng, _ASK_PHRASES).replace("{np}", _pick(rng, foreign.noun_phrases))
        else:
            template = _pick(rng, foreign.questions)
        return self.turn_of(self.query(template.replace("{s}", noun)), FOREIGN_ANSWERS[1], "foreign")

    def overwrite(self) -> Interaction:
        rng = self.rng
        fact = self.facts[_pick(rng, list(self.facts))]
        past = [*fact.stale, fact.value]
        fact.value = self.value_for(fact.attribute, past)
        fact.stale = [value for value in past if value != fact.value]
        fact.stated = fact.said = self.turn
        style = rng.random()
        template = _pick(rng, fact.attribute.changes) if style < 0.35 else self.statement(fact.attribute)
        if 0.25 < style < 0.6:
            template = _joined(_pick(rng, _CHANGE_PREFIXES), template)
        elif 0.6 < style < 0.75 and template.endswith("{v}."):
            template = template[:-1] + " now."
        query = self.query(template, fact.value)
        return self.turn_of(query, self.acknowledge([fact], _CHANGE_REPEATS, _CHANGE_ACKS), "overwrite", fact)

    def acknowledge(self, facts: Sequence[_Fact], repeats: Sequence[str], plain: Sequence[str]) -> str:
        if plain and self.rng.random() < 1 / 3:
            return _pick(self.rng, plain)
        sentences = [_fill(_pick(self.rng, fact.attribute.answers), fact.value) for fact in facts]
        return _pick(self.rng, repeats) + " ".join([_lower_first(sentences[0]), *sentences[1:]])

    def question(self, attribute: Attribute) -> str:
        rng = self.rng
        if self.is_casual():
            template = _pick(rng, self.casual[attribute.name][1])
            if rng.random() < 0.2:
                template = _joined(_pick(rng, _CASUAL_ASK_PREFIXES), template)
            return self.query(template)
        style = rng.random()
        if style < 0.4:
            template = _pick(rng, _ASK_PHRASES).replace("{np}", _pick(rng, attribute.noun_phrases))
        else:
            template = _pick(rng, attribute.questions)
            if style > 0.8:
                template = _joined(_pick(rng, _ASK_PREFIXES), template)
        return self.query(template)

    def ask(self, fact: _Fact) -> Interaction:
        answer = _fill(_pick(self.rng, fact.attribute.answers), fact.value)
        turn = self.turn_of(self.question(fact.attribute), answer, "ask", fact)
        turn["distance"], turn["distance_stated"] = self.turn - fact.said, self.turn - fact.stated
        fact.said = self.turn
        return turn

    def ask_unknown(self, name: str | None = None) -> Interaction:
        name = name or _pick(self.rng, [name for name in ATTRIBUTES if name not in self.facts])
        turn = self.turn_of(self.question(ATTRIBUTES[name]), UNKNOWN_ANSWER, "unknown")
        turn["attribute"] = name
        return turn

    def chat(self) -> Interaction:
        query, answers = _pick(self.rng, _CASUAL_CHAT if self.is_casual() else CHAT)
        query = re.sub("{n}", lambda _: str(1 + int(self.rng.random() * 99)), query)
        return self.turn_of(self.query(query), _pick(self.rng, answers), "chat")

    def turn_of(
        self,
        query: str,
        answer: str,
        kind: str,
        fact: _Fact | None = None,
        also: list[tuple[str, str]] | None = None,
    ) -> Interaction:
        return Interaction(
            query=query,
            answer=answer,
            kind=kind,
            attribute=fact.attribute.name if fact else None,
            value=fact.value if fact else None,
            also=also or [],
            stale=list(fact.stale) if fact else [],
            distance=None,
            distance_stated=None,
            live_facts=len(self.facts),
        )

    def askable(self) -> list[_Fact]:
        facts = list(self.facts.values())
        if self.split == "unseen":
            facts = [fact for fact in facts if (fact.attribute.name, fact.value) in HELD_OUT_PAIRS]
        return facts

    def next(self, weights: Sequence[float], p_unknown: float, p_two: float) -> Interaction:
        rng = self.rng
        if self.p_foreign and rng.random() < self.p_foreign:
            return self.tell_foreign()
        draw = rng.random() * sum(weights)
        kind = "chat"
        for name, weight in zip(("state", "overwrite", "ask", "chat"), weights, strict=True):
            if draw < weight:
                kind = name
                break
            draw -= weight
        if kind == "ask":
            if rng.random() < p_unknown and len(self.facts) < len(ATTRIBUTES):
                return self.ask_unknown()
            if facts := self.askable():
                return self.ask(_pick(rng, facts))
            kind = "state"
        if kind == "overwrite" and not self.facts:
            kind = "state"
        if kind == "state":
            kind = "state" if len(self.facts) < self.max_live else "overwrite"
        if kind == "chat" or self.max_live < 1:
            return self.chat()
        if kind == "state" and self.p_introduction and rng.random() < self.p_introduction:
            return self.introduce()
        return self.state(p_two) if kind == "state" else self.overwrite()


def generate_dialogue(
    seed: int,
    *,
    split: str = "train",
    num_turns: int = 8,
    p_state: float = 0.38,
    p_overwrite: float = 0.10,
    p_ask: float = 0.37,
    p_chat: float = 0.15,
    p_unknown: float = 0.12,
    p_open: float | None = None,
    p_new: float | None = None,
    p_two: float = 0.1,
    p_noise: float = 0.15,
    p_casual: float = 0.0,
    p_introduction: float = 0.0,
    p_foreign: float = 0.0,
    max_live_facts: int | None = None,
    only_open: bool = False,
) -> Dialogue:
    """
    Write the dialogue of a seed; turns that are impossible (a question before any fact) become statements.
    `only_open` states nothing but attributes that any word fits, as split "open" does; `p_open` is the share of their
    values that are names out of no list, `p_new` that share for the other attributes (see `NEW_TYPES`). `p_casual` is
    the share of the phrases that are as people type them, and not those that all else here was measured with.
    `p_introduction` is the share of the statements that tell several facts in a sentence, `p_foreign` that of the
    turns about things that no attribute is about (kind "foreign"), or about an attribute that is like the last one.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    default_open = {"train": 0.5, "open": 1.0}.get(split, 0.0)
    writer = DialogueWriter(
        Random(f"{split}:{seed}"),
        split,
        default_open if p_open is None else p_open,
        p_noise,
        len(ATTRIBUTES) if max_live_facts is None else max_live_facts,
        only_open or split == "open",
        float(split == "new") if p_new is None else p_new,
        p_casual,
        p_introduction,
        p_foreign,
    )
    turns = []
    for writer.turn in range(num_turns):
        turns.append(writer.next((p_state, p_overwrite, p_ask, p_chat), p_unknown, p_two))
    return Dialogue(seed=seed, split=split, interactions=turns)


def iterate_dialogues(start_seed: int, **kwargs: Any) -> Iterator[Dialogue]:
    """Dialogues of start_seed, start_seed + 1, ... without end."""
    seed = start_seed
    while True:
        yield generate_dialogue(seed, **kwargs)
        seed += 1


def corpus_texts(num_dialogues: int, start_seed: int = 1_000_000, **kwargs: Any) -> Iterator[str]:
    """Queries and answers of training dialogues, to train a tokenizer on."""
    for seed in range(start_seed, start_seed + num_dialogues):
        for turn in generate_dialogue(seed, split="train", **kwargs)["interactions"]:
            yield turn["query"]
            yield turn["answer"]


def contains_value(text: str, value: str) -> bool:
    """Whether the value stands in the text as whole words, in exactly this case."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text) is not None


def score_answer(interaction: Interaction, answer_text: str) -> dict[str, bool]:
    """
    Judge an answer: `correct` is the current value for questions, "not told" for unknown ones, "cannot keep" for
    what no attribute is about, else equality.
    """
    value, kind = interaction["value"], interaction["kind"]
    right = value is not None and contains_value(answer_text, value)
    old = any(contains_value(answer_text, stale) for stale in interaction["stale"])
    abstained = "not told me" in answer_text
    if kind == "ask":
        correct = right and not old
    elif kind == "unknown":
        correct = abstained
    elif kind == "foreign":
        correct = "cannot keep" in answer_text
    else:
        correct = answer_text.strip() == interaction["answer"]
    return {"correct": correct, "stale": old and not right, "abstained": abstained}
