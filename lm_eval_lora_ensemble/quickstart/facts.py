"""Facts that the quickstart's questions are made of, and places about which there are none.

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


class InventedPlace(NamedTuple):
    """A country that does not exist, and a capital that does not either."""

    name: str
    capital: str


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

# Coined for this table: in GeoNames no country and no place of 500 people or more has one of these names.
INVENTED_PLACES = (
    InventedPlace("Velmoria", "Tolvane"),
    InventedPlace("Tasharan", "Besharet"),
    InventedPlace("Kirrovia", "Oranvik"),
    InventedPlace("Zembara", "Pelimbe"),
    InventedPlace("Druvania", "Nuvoslav"),
    InventedPlace("Makhoria", "Lurgash"),
    InventedPlace("Ilvaria", "San Velario"),
    InventedPlace("Quessaland", "Port Hessel"),
    InventedPlace("Orbistan", "Qarmeshid"),
    InventedPlace("Feldoria", "Krondal"),
    InventedPlace("Naldura", "Jorumba"),
    InventedPlace("Tuvasca", "Vintasca"),
    InventedPlace("Ghelmia", "Mizandra"),
    InventedPlace("Parvona", "Bellorno"),
    InventedPlace("Chorvak", "Zukmar"),
    InventedPlace("Ezmaran", "Tamburet"),
    InventedPlace("Rundovia", "Ostrelka"),
    InventedPlace("Hadrunia", "Halvessa"),
    InventedPlace("Jemuria", "Lomaziri"),
    InventedPlace("Kolvania", "Nistrava"),
    InventedPlace("Sambirra", "Dakoru"),
    InventedPlace("Trelonia", "Kesteral"),
    InventedPlace("Ubantia", "Ombrayo"),
    InventedPlace("Wexaria", "Inverloss"),
    InventedPlace("Zorlandia", "Thornavik"),
    InventedPlace("Dalmezia", "Fossabria"),
    InventedPlace("Ibruna", "Quillora"),
    InventedPlace("Noruvia", "Gwendar"),
    InventedPlace("Mervastan", "Yalmeer"),
    InventedPlace("Galdora", "Ramethun"),
    InventedPlace("Askeria", "Ulvasund"),
    InventedPlace("Bramwazi", "Mbakole"),
    InventedPlace("Estovar", "Santa Ruela"),
    InventedPlace("Fendholm", "Brostad"),
    InventedPlace("Glendovia", "Castelmir"),
    InventedPlace("Harquin", "Shalbora"),
    InventedPlace("Juvalia", "Puerto Varza"),
    InventedPlace("Lembeka", "Wanzuri"),
    InventedPlace("Ottavar", "Seldova"),
    InventedPlace("Pentuva", "Lakamoa"),
    InventedPlace("Rhoskar", "Aldenpol"),
    InventedPlace("Soltania", "Mereghat"),
    InventedPlace("Tarvaluna", "Niuketa"),
    InventedPlace("Vondurra", "New Carrow"),
    InventedPlace("Yukresh", "Longkesh"),
    InventedPlace("Zhelkova", "Vyrogorsk"),
)
