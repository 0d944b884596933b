"""The phrasings of questions, one per line. Every tenth phrasing of a topic is held back for scoring.

{pic} stands for one of the words for the picture. `questions.py` fills in {x}, {y}, {place}, ….
"""

from typing import Literal

Phrasing = Literal["training", "held back"]
PICTURE = ("the picture", "the image", "this picture", "this image", "the scene")

TOPICS = {
    "one": """
        What is this?
        What is in {pic}?
        What do you see?
        What can you see in {pic}?
        Name the object.
        What does {pic} show?
        What is shown here?
        Tell me what this is.
        What object is this?
        Which object is in {pic}?
        What am I looking at?
        Can you name this thing?
        What thing is in {pic}?
        Please name what you see.
        What is it?
        Do you know what this is?
        Say what is in {pic}.
        What is there in {pic}?
        What is drawn here?
        Identify the object.
        """,
    "all": """
        What is in {pic}?
        What do you see?
        What objects are in {pic}?
        Which things are there?
        List all objects.
        What can you see in {pic}?
        Name everything in {pic}.
        What does {pic} show?
        Which objects do you see?
        Tell me what is in {pic}.
        Name all the things you see.
        What things can you see here?
        List what is in {pic}.
        What is there in {pic}?
        Say what objects are shown.
        What are the objects here?
        Can you name all objects?
        What is shown in {pic}?
        What is drawn here?
        Give me a list of the objects.
        """,
    "at": """
        What is {place}?
        What is {place} of {pic}?
        Which object is {place}?
        What do you see {place}?
        What can you see {place} of {pic}?
        Name the object {place}.
        What is there {place}?
        What stands {place}?
        Tell me what is {place}.
        Which thing is {place} of {pic}?
        What is shown {place}?
        Look {place}. What is it?
        What thing do you see {place} of {pic}?
        What object is {place}?
        Say what is {place}.
        """,
    "where": """
        Where {is} {the_x}?
        Where {is} {the_x} in {pic}?
        In which part of {pic} {is} {the_x}?
        Where do you see {the_x}?
        Where can I find {the_x}?
        Tell me where {the_x} {is}.
        Point me to {the_x}.
        What is the place of {the_x}?
        Where in {pic} {is} {the_x}?
        Where should I look for {the_x}?
        Find {the_x}.
        Which part of {pic} shows {the_x}?
        Say where {the_x} {is}.
        Please find {the_x} in {pic}.
        Where exactly {is} {the_x}?
        """,
    "relation": """
        Where {is} {the_x} relative to {the_y}?
        Where {is} {the_x}, seen from {the_y}?
        What is the place of {the_x} seen from {the_y}?
        On which side of {the_y} {is} {the_x}?
        Left, right, above or below {the_y}: where {is} {the_x}?
        In which direction from {the_y} {is} {the_x}?
        Where {is} {the_x} compared with {the_y}?
        Looking from {the_y}, where {is} {the_x}?
        Tell me where {the_x} {is} relative to {the_y}.
        What is the position of {the_x} relative to {the_y}?
        From {the_y}, which way {is} {the_x}?
        """,
    "beside": """
        What is {side} {the_x}?
        Which object is {side} {the_x}?
        What do you see {side} {the_x}?
        What can be seen {side} {the_x}?
        Name the thing {side} {the_x}.
        What stands {side} {the_x}?
        Tell me what is {side} {the_x}.
        What is there {side} {the_x}?
        Which thing is {side} {the_x}?
        Look {side} {the_x}. What do you see?
        What object is {side} {the_x} in {pic}?
        """,
    "count": """
        How many objects are there?
        How many things are in {pic}?
        How many objects are in {pic}?
        How many things do you see?
        Count the objects.
        How many objects can you see?
        What is the number of objects?
        How many things can you count?
        Tell me how many objects there are.
        How many objects does {pic} show?
        Please count the things in {pic}.
        How many things are shown?
        How many different places have an object?
        Can you count the objects in {pic}?
        Give me the number of things in {pic}.
        """,
    "count name": """
        How many {xs} are there?
        How many {xs} do you see?
        How many {xs} are in {pic}?
        Count the {xs}.
        How many {xs} can you see?
        What is the number of {xs}?
        How many {xs} can you count?
        Tell me how many {xs} there are.
        How many {xs} does {pic} show?
        Please count the {xs} in {pic}.
        How many {xs} are shown?
        Can you count the {xs}?
        Give me the number of {xs} in {pic}.
        """,
    "background": """
        What colour is the background?
        What color is the background?
        Which colour does the background have?
        Which color is the background?
        What is the colour of the background?
        What is the color of the background?
        Tell me the colour of the background.
        What colour is behind the objects?
        In what color is the background?
        Name the background colour.
        Name the background color.
        What color is the background of {pic}?
        The background is of which colour?
        What colour does the background of {pic} have?
        """,
    "word color": """
        What colour is the word {word}?
        What color is the word {word}?
        Which colour does {word} have?
        What is the colour of {word}?
        What is the color of the word {word}?
        In which colour is {word} printed?
        In what color is {word} written?
        Tell me the colour of the word {word}.
        Which color is the text {word}?
        What colour is the text {word}?
        What color are the letters of {word}?
        What colour are the letters of {word}?
        """,
    "color": """
        What colour {is} {the_x}?
        What color {is} {the_x}?
        Which colour {is} {the_x}?
        Which color {is} {the_x}?
        What is the colour of {the_x}?
        What is the color of {the_x}?
        Tell me the colour of {the_x}.
        Tell me the color of {the_x}.
        In which colour {is} {the_x} drawn?
        Name the colour of {the_x}.
        Name the color of {the_x}.
        """,
    "is there": """
        Is there {a_x} in {pic}?
        Is there {a_x}?
        Do you see {a_x}?
        Can you see {a_x} in {pic}?
        Does {pic} show {a_x}?
        Is {a_x} in {pic}?
        Can I see {a_x} here?
        Is {a_x} shown?
        Can you find {a_x}?
        Does {pic} have {a_x} in it?
        Do you see {a_x} in {pic}?
        Is {a_x} among the objects?
        Tell me if there is {a_x}.
        Is there {a_x} here?
        Is {a_x} there?
        Does {a_x} appear in {pic}?
        """,
    "is it": """
        Is this {a_x}?
        Is it {a_x}?
        Is that {a_x}?
        Is the object {a_x}?
        Would you say that this is {a_x}?
        Does {pic} show {a_x}?
        Is this object {a_x}?
        Am I looking at {a_x}?
        Do you see {a_x}?
        Is this thing {a_x}?
        Is {a_x} shown here?
        """,
    "is background": """
        Is the background {color}?
        Is the background of {pic} {color}?
        Does {pic} have {a_color} background?
        Is {color} the colour of the background?
        Is {color} the color of the background?
        Is it {a_color} background?
        Are the objects on {a_color} background?
        Would you say the background is {color}?
        Is there {a_color} background?
        Is the ground behind the objects {color}?
        Do you see {a_color} background?
        """,
    "is beside": """
        {is} {the_x} {side} {the_y}?
        Do you see {the_x} {side} {the_y}?
        Is it true that {the_x} {is} {side} {the_y}?
        Can you say that {the_x} {is} {side} {the_y}?
        In {pic}, {is} {the_x} {side} {the_y}?
        In the picture, {is} {the_x} {side} {the_y}?
        Would you say {the_x} {is} {side} {the_y}?
        {is} {the_x} placed {side} {the_y}?
        Tell me if {the_x} {is} {side} {the_y}.
        Can {the_x} be seen {side} {the_y}?
        """,
    "is number": """
        Are there {n} {things}?
        Are there {n} {things} in {pic}?
        Do you see {n} {things}?
        Does {pic} show {n} {things}?
        Is the number of {things} {n}?
        Can you count {n} {things}?
        Is it true that there are {n} {things}?
        Would you count {n} {things}?
        Are {n} {things} shown?
        Can you see {n} {things}?
        Are {n} {things} in {pic}?
        """,
    "is text": """
        Is there any text?
        Is there a word in {pic}?
        Do you see any text?
        Is anything written in {pic}?
        Are there words or numbers in {pic}?
        Can you see any text in {pic}?
        Does {pic} have text?
        Is something printed in {pic}?
        Is there some text to read?
        Is there anything to read?
        Does {pic} show any words or numbers?
        """,
    "read": """
        What does the text say?
        Read the text.
        What is written in {pic}?
        What text do you see?
        Which word is in {pic}?
        What does it say?
        Please read the text in {pic}.
        What is printed there?
        Can you read the text?
        Tell me what the text says.
        What is the text in {pic}?
        Read what is printed in {pic}.
        What can you read?
        Which text is printed?
        What words do you see?
        What is written there?
        """,
    "detail": """
        Describe the picture.
        Describe the image in detail.
        Describe {pic}.
        Tell me about {pic}.
        Give a full description of {pic}.
        What is going on in {pic}?
        Please describe {pic} in detail.
        Explain what {pic} shows.
        Write a description of {pic}.
        Tell me all you see in {pic}.
        Can you describe {pic}?
        Describe everything you see.
        Give me all details of {pic}.
        Describe {pic} to someone who cannot see it.
        Look at {pic} and describe it.
        Say all that you can see in {pic}.
        """,
    "which are": """
        Which of these are {kinds}?
        Which of the objects are {kinds}?
        What here is {kind}?
        Which things in {pic} are {kinds}?
        Name the {kinds} in {pic}.
        Which {kinds} do you see?
        What {kinds} are in {pic}?
        Which {kinds} can you see?
        Tell me which of these are {kinds}.
        List the {kinds}.
        Which {kinds} are shown in {pic}?
        Find the {kinds} in {pic}.
        """,
    "which can you": """
        Which of these can you {do}?
        What here can you {do}?
        What could I {do}?
        Which of the objects could you {do}?
        What in {pic} can you {do}?
        Which thing here would you {do}?
        What would you {do}?
        Which of these could I {do}?
        Tell me what one can {do}.
        Which of these things would you {do}?
        What can I {do} here?
        Find what you can {do}.
        """,
    "which can": """
        Which of these can {do}?
        What here can {do}?
        Which of the objects can {do}?
        What in {pic} can {do}?
        Which things in {pic} can {do}?
        Tell me which of these can {do}.
        Name what can {do}.
        Which of these things can {do}?
        Find what can {do}.
        What can {do}?
        Which ones can {do}?
        """,
    "odd one": """
        Which is the odd one out?
        What is the odd one out?
        Which object does not belong?
        Which thing does not fit?
        What does not belong with the others?
        Which of these is different?
        Find the odd one out.
        Which one does not fit with the rest?
        Tell me the odd one out.
        Which object is not like the others?
        One thing does not belong. Which one?
        Name the thing that does not fit.
        """,
    "what kind": """
        What kind of thing {is} {the_x}?
        What {is} {the_x}?
        What sort of thing {is} {the_x}?
        Tell me what kind of thing {the_x} {is}.
        Which kind of object {is} {the_x}?
        What can you say about {the_x}?
        What do you know about {the_x}?
        What sort of object {is} {the_x}?
        To which kind of things belongs {the_x}?
        What group of things {is} {the_x} in?
        Say what kind of thing {the_x} {is}.
        """,
    "define": """
        What is {a_x}?
        What kind of thing is {a_x}?
        What is meant by {a_x}?
        Tell me what {a_x} is.
        Do you know what {a_x} is?
        Explain what {a_x} is.
        What sort of thing is {a_x}?
        Can you say what {a_x} is?
        What can you say about {a_x}?
        What do you know about {a_x}?
        Say what {a_x} is.
        """,
    "is kind": """
        Is {a_x} {kind}?
        Is {a_x} a kind of {bare}?
        Would you call {a_x} {kind}?
        Do people call {a_x} {kind}?
        Tell me if {a_x} is {kind}.
        Can you call {a_x} {kind}?
        Is it right that {a_x} is {kind}?
        Does {a_x} count as {kind}?
        Would you say {a_x} is {kind}?
        Is {a_x} really {kind}?
        """,
    "name three": """
        Name three {kinds}.
        Tell me three {kinds}.
        Which {kinds} do you know?
        Give me three {kinds}.
        List three {kinds}.
        Can you name some {kinds}?
        Say the names of three {kinds}.
        What {kinds} do you know?
        I need three {kinds}.
        Give an example of three {kinds}.
        """,
}


def phrasings(topic: str, which: Phrasing) -> list[str]:
    """The phrasings of a topic for training, or those held back."""
    lines = [line.strip() for line in TOPICS[topic].strip().splitlines()]
    return [line for i, line in enumerate(lines) if (i % 10 == 4) == (which == "held back")]
