"""Facts that the quickstart's questions are made of.

Left out on purpose: countries whose capital, continent or currency is disputed, divided or changing, and
those whose capital is named after them.
"""

from __future__ import annotations

from typing import NamedTuple


class Country(NamedTuple):
    """A sovereign state; ``currency`` is the bare unit, so that it does not name the country."""

    name: str
    capital: str
    continent: str
    currency: str


class Element(NamedTuple):
    """A chemical element."""

    name: str
    symbol: str
    number: int


CONTINENTS = ("Africa", "Asia", "Europe", "North America", "South America", "Oceania")

COUNTRIES = (
    Country("Albania", "Tirana", "Europe", "lek"),
    Country("Algeria", "Algiers", "Africa", "dinar"),
    Country("Angola", "Luanda", "Africa", "kwanza"),
    Country("Argentina", "Buenos Aires", "South America", "peso"),
    Country("Australia", "Canberra", "Oceania", "dollar"),
    Country("Austria", "Vienna", "Europe", "euro"),
    Country("Bangladesh", "Dhaka", "Asia", "taka"),
    Country("Barbados", "Bridgetown", "North America", "dollar"),
    Country("Belgium", "Brussels", "Europe", "euro"),
    Country("Botswana", "Gaborone", "Africa", "pula"),
    Country("Brazil", "Brasília", "South America", "real"),
    Country("Cambodia", "Phnom Penh", "Asia", "riel"),
    Country("Cameroon", "Yaoundé", "Africa", "franc"),
    Country("Canada", "Ottawa", "North America", "dollar"),
    Country("Chile", "Santiago", "South America", "peso"),
    Country("China", "Beijing", "Asia", "yuan"),
    Country("Colombia", "Bogotá", "South America", "peso"),
    Country("Costa Rica", "San José", "North America", "colón"),
    Country("Cuba", "Havana", "North America", "peso"),
    Country("Denmark", "Copenhagen", "Europe", "krone"),
    Country("Dominican Republic", "Santo Domingo", "North America", "peso"),
    Country("Ecuador", "Quito", "South America", "dollar"),
    Country("Estonia", "Tallinn", "Europe", "euro"),
    Country("Ethiopia", "Addis Ababa", "Africa", "birr"),
    Country("Fiji", "Suva", "Oceania", "dollar"),
    Country("Finland", "Helsinki", "Europe", "euro"),
    Country("France", "Paris", "Europe", "euro"),
    Country("Germany", "Berlin", "Europe", "euro"),
    Country("Ghana", "Accra", "Africa", "cedi"),
    Country("Greece", "Athens", "Europe", "euro"),
    Country("Honduras", "Tegucigalpa", "North America", "lempira"),
    Country("Hungary", "Budapest", "Europe", "forint"),
    Country("Iceland", "Reykjavik", "Europe", "krona"),
    Country("India", "New Delhi", "Asia", "rupee"),
    Country("Iran", "Tehran", "Asia", "rial"),
    Country("Iraq", "Baghdad", "Asia", "dinar"),
    Country("Ireland", "Dublin", "Europe", "euro"),
    Country("Italy", "Rome", "Europe", "euro"),
    Country("Jamaica", "Kingston", "North America", "dollar"),
    Country("Japan", "Tokyo", "Asia", "yen"),
    Country("Jordan", "Amman", "Asia", "dinar"),
    Country("Kenya", "Nairobi", "Africa", "shilling"),
    Country("Laos", "Vientiane", "Asia", "kip"),
    Country("Latvia", "Riga", "Europe", "euro"),
    Country("Lebanon", "Beirut", "Asia", "pound"),
    Country("Lithuania", "Vilnius", "Europe", "euro"),
    Country("Madagascar", "Antananarivo", "Africa", "ariary"),
    Country("Mali", "Bamako", "Africa", "franc"),
    Country("Mongolia", "Ulaanbaatar", "Asia", "tögrög"),
    Country("Morocco", "Rabat", "Africa", "dirham"),
    Country("Mozambique", "Maputo", "Africa", "metical"),
    Country("Namibia", "Windhoek", "Africa", "dollar"),
    Country("Nepal", "Kathmandu", "Asia", "rupee"),
    Country("New Zealand", "Wellington", "Oceania", "dollar"),
    Country("Nicaragua", "Managua", "North America", "córdoba"),
    Country("Norway", "Oslo", "Europe", "krone"),
    Country("Pakistan", "Islamabad", "Asia", "rupee"),
    Country("Papua New Guinea", "Port Moresby", "Oceania", "kina"),
    Country("Paraguay", "Asunción", "South America", "guaraní"),
    Country("Peru", "Lima", "South America", "sol"),
    Country("Poland", "Warsaw", "Europe", "złoty"),
    Country("Portugal", "Lisbon", "Europe", "euro"),
    Country("Romania", "Bucharest", "Europe", "leu"),
    Country("Samoa", "Apia", "Oceania", "tala"),
    Country("Saudi Arabia", "Riyadh", "Asia", "riyal"),
    Country("Senegal", "Dakar", "Africa", "franc"),
    Country("Serbia", "Belgrade", "Europe", "dinar"),
    Country("Slovakia", "Bratislava", "Europe", "euro"),
    Country("Slovenia", "Ljubljana", "Europe", "euro"),
    Country("South Korea", "Seoul", "Asia", "won"),
    Country("Spain", "Madrid", "Europe", "euro"),
    Country("Sweden", "Stockholm", "Europe", "krona"),
    Country("Thailand", "Bangkok", "Asia", "baht"),
    Country("Uganda", "Kampala", "Africa", "shilling"),
    Country("Ukraine", "Kyiv", "Europe", "hryvnia"),
    Country("United Kingdom", "London", "Europe", "pound"),
    Country("Uruguay", "Montevideo", "South America", "peso"),
    Country("Vanuatu", "Port Vila", "Oceania", "vatu"),
    Country("Venezuela", "Caracas", "South America", "bolívar"),
    Country("Vietnam", "Hanoi", "Asia", "dong"),
    Country("Zambia", "Lusaka", "Africa", "kwacha"),
)

ELEMENTS = (
    Element("hydrogen", "H", 1),
    Element("helium", "He", 2),
    Element("lithium", "Li", 3),
    Element("beryllium", "Be", 4),
    Element("boron", "B", 5),
    Element("carbon", "C", 6),
    Element("nitrogen", "N", 7),
    Element("oxygen", "O", 8),
    Element("fluorine", "F", 9),
    Element("neon", "Ne", 10),
    Element("sodium", "Na", 11),
    Element("magnesium", "Mg", 12),
    Element("aluminium", "Al", 13),
    Element("silicon", "Si", 14),
    Element("phosphorus", "P", 15),
    Element("sulfur", "S", 16),
    Element("chlorine", "Cl", 17),
    Element("argon", "Ar", 18),
    Element("potassium", "K", 19),
    Element("calcium", "Ca", 20),
    Element("scandium", "Sc", 21),
    Element("titanium", "Ti", 22),
    Element("vanadium", "V", 23),
    Element("chromium", "Cr", 24),
    Element("manganese", "Mn", 25),
    Element("iron", "Fe", 26),
    Element("cobalt", "Co", 27),
    Element("nickel", "Ni", 28),
    Element("copper", "Cu", 29),
    Element("zinc", "Zn", 30),
    Element("gallium", "Ga", 31),
    Element("germanium", "Ge", 32),
    Element("arsenic", "As", 33),
    Element("selenium", "Se", 34),
    Element("bromine", "Br", 35),
    Element("krypton", "Kr", 36),
    Element("rubidium", "Rb", 37),
    Element("strontium", "Sr", 38),
    Element("yttrium", "Y", 39),
    Element("zirconium", "Zr", 40),
    Element("niobium", "Nb", 41),
    Element("molybdenum", "Mo", 42),
    Element("ruthenium", "Ru", 44),
    Element("rhodium", "Rh", 45),
    Element("palladium", "Pd", 46),
    Element("silver", "Ag", 47),
    Element("cadmium", "Cd", 48),
    Element("indium", "In", 49),
    Element("tin", "Sn", 50),
    Element("antimony", "Sb", 51),
    Element("iodine", "I", 53),
    Element("xenon", "Xe", 54),
    Element("barium", "Ba", 56),
    Element("tungsten", "W", 74),
    Element("platinum", "Pt", 78),
    Element("gold", "Au", 79),
    Element("mercury", "Hg", 80),
    Element("lead", "Pb", 82),
    Element("radon", "Rn", 86),
    Element("uranium", "U", 92),
)
