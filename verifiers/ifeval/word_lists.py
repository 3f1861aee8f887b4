"""Lists of words, names and places that instructions speak of."""

STOP_WORDS = frozenset(  # the English list of nltk's corpora, of which '\w+' can find those without an apostrophe
    str.split(
        "i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers "
        "herself it its itself they them their theirs themselves what which who whom this that these those am is are "
        "was were be been being have has had having do does did doing a an the and but if or because as until while of "
        "at by for with about against between into through during before after above below to from up down in out on "
        "off over under again further then once here there when where why how all any both each few more most other "
        "some such no nor not only own same so than too very s t can will just don should now d ll m o re ve y ain "
        "aren couldn didn doesn hadn hasn haven isn ma mightn mustn needn shan shouldn wasn weren won wouldn"
    )
)
CONJUNCTIONS = frozenset(("and", "but", "for", "nor", "or", "so", "yet"))
PRONOUNS = frozenset(
    str.split(
        "i me we us you he him she her it they them my mine our ours your yours his hers its their theirs myself "
        "ourselves yourself yourselves himself herself itself themselves this that these those who whom whose which "
        "what whoever whomever whatever whichever anybody anyone anything everybody everyone everything nobody nothing "
        "somebody someone something each either neither both all some any none"
    )
)
PERSON_NAMES = tuple(  # as IFBench's prompt lists them
    str.split(
        "Emma Liam Sophia Jackson Olivia Noah Ava Lucas Isabella Mason Mia Ethan Charlotte Alexander Amelia Benjamin "
        "Harper Leo Zoe Daniel Chloe Samuel Lily Matthew Grace Owen Abigail Gabriel Ella Jacob Scarlett Nathan "
        "Victoria Elijah Layla Nicholas Audrey David Hannah Christopher Penelope Thomas Nora Andrew Aria Joseph Claire "
        "Ryan Stella Jonathan"
    )
)
# Capitals of Europe north of 45 degrees, from north to south. IFBench's list has no Kyiv (50.45 degrees).
NORTHERN_CAPITALS = tuple(
    str.split(
        "Reykjavik Helsinki Oslo Tallinn Stockholm Riga Moscow Copenhagen Vilnius Minsk Dublin Berlin Amsterdam Warsaw "
        "London Brussels Kyiv Prague Luxembourg Paris Vienna Bratislava Budapest Vaduz Chisinau Bern Ljubljana Zagreb"
    )
)
AFRICA = (  # the 54 members of the United Nations, with other names in use; '=' joins the names of one country
    "Algeria|Angola|Benin|Botswana|Burkina Faso|Burundi|Cabo Verde=Cape Verde|Cameroon|Central African Republic|Chad|"
    "Comoros=Union of the Comoros|Congo=Republic of the Congo=Congo Republic of the=Congo (Brazzaville)="
    "Congo-Brazzaville=Congo (Republic of the)=Congo (Republic)|Democratic Republic of the Congo="
    "Democratic Republic of Congo=DR Congo=Congo (Kinshasa)=Congo-Kinshasa=Congo Democratic Republic of the="
    "Congo (Democratic Republic of the)=Congo (Democratic Republic)=DRC|"
    "Cote d'Ivoire=Ivory Coast|Djibouti|Egypt|Equatorial Guinea|Eritrea|Eswatini=Swaziland=Eswatini (Swaziland)|"
    "Ethiopia|Gabon|Gambia=The Gambia=Gambia The|Ghana|Guinea|Guinea-Bissau=Guinea Bissau|Kenya|Lesotho|Liberia|Libya|"
    "Madagascar|Malawi|Mali|Mauritania|Mauritius|Morocco|Mozambique|Namibia|Niger|Nigeria|Rwanda|"
    "Sao Tome and Principe|Senegal|Seychelles|Sierra Leone|Somalia|South Africa|South Sudan|Sudan|Tanzania|Togo|"
    "Tunisia|Uganda|Zambia|Zimbabwe"
)
AFRICAN_COUNTRIES = {name.lower(): names.split("=")[0] for names in AFRICA.split("|") for name in names.split("=")}
