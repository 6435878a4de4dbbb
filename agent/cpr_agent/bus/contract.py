# SPDX-License-Identifier: GPL-2.0-or-later
"""The XML contract as tables: methods and properties, their signatures, and the polkit action that each needs."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import msgspec

BUS_NAME = "org.cpragent1"
ROOT = "/org/cpragent1"
INSPECT = "org.cpragent1.inspect"
_ACTION = "org.cpragent1.Action"
_DOCTYPE = (
    '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
    '"http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
)

STANDARD = """<node>
<interface name="org.freedesktop.DBus.Introspectable">
<method name="Introspect"><arg name="xml" type="s" direction="out"/></method></interface>
<interface name="org.freedesktop.DBus.Peer"><method name="Ping"/>
<method name="GetMachineId"><arg name="id" type="s" direction="out"/></method></interface>
<interface name="org.freedesktop.DBus.Properties">
<method name="Get"><arg name="interface" type="s" direction="in"/><arg name="name" type="s" direction="in"/>
<arg name="value" type="v" direction="out"/></method>
<method name="GetAll"><arg name="interface" type="s" direction="in"/>
<arg name="values" type="a{sv}" direction="out"/></method>
<method name="Set"><arg name="interface" type="s" direction="in"/><arg name="name" type="s" direction="in"/>
<arg name="value" type="v" direction="in"/></method>
<signal name="PropertiesChanged"><arg name="interface" type="s"/><arg name="changed" type="a{sv}"/>
<arg name="invalidated" type="as"/></signal></interface>
<interface name="org.freedesktop.DBus.ObjectManager">
<method name="GetManagedObjects"><arg name="objects" type="a{oa{sa{sv}}}" direction="out"/></method>
<signal name="InterfacesAdded"><arg name="object" type="o"/><arg name="interfaces" type="a{sa{sv}}"/></signal>
<signal name="InterfacesRemoved"><arg name="object" type="o"/><arg name="interfaces" type="as"/></signal></interface>
</node>"""


class Method(msgspec.Struct, frozen=True):
    name: str
    action: str
    in_signature: str
    out_signature: str


class Interface(msgspec.Struct, frozen=True):
    name: str
    methods: dict[str, Method]
    properties: dict[str, str]
    """Name to signature."""
    silent: frozenset[str]
    """Properties whose changes are not signalled: there are none, or they have no event."""
    writable: frozenset[str]
    settable: str
    """The action that setting any of them needs; "" if none can be set."""
    xml: ElementTree.Element


def read_contract() -> dict[str, Interface]:
    """All interfaces of org.cpragent1, by name."""
    return _interfaces(Path(__file__).with_name("org.cpragent1.xml").read_text())


def standard_interfaces() -> dict[str, Interface]:
    return _interfaces(STANDARD)


def _interfaces(text: str) -> dict[str, Interface]:
    root = ElementTree.fromstring(text)  # noqa: S314 - our own file
    return {element.attrib["name"]: _interface(element) for element in root.iter("interface")}


def _interface(element: ElementTree.Element) -> Interface:
    methods = {}
    for method in element.iter("method"):
        args = [(arg.attrib.get("direction", "in"), arg.attrib["type"]) for arg in method.iter("arg")]
        methods[method.attrib["name"]] = Method(
            method.attrib["name"],
            next((a.attrib["value"] for a in method.iter("annotation") if a.attrib["name"] == _ACTION), ""),
            "".join(kind for direction, kind in args if direction == "in"),
            "".join(kind for direction, kind in args if direction == "out"),
        )
    properties = list(element.iter("property"))
    return Interface(
        element.attrib["name"],
        methods,
        {p.attrib["name"]: p.attrib["type"] for p in properties},
        frozenset(
            p.attrib["name"]
            for p in properties
            if any(a.attrib["value"] in ("false", "const") for a in p.iter("annotation"))
        ),
        frozenset(p.attrib["name"] for p in properties if p.attrib["access"] == "readwrite"),
        next((a.attrib["value"] for p in properties for a in p.iter("annotation") if a.attrib["name"] == _ACTION), ""),
        element,
    )


def introspection(interfaces: list[Interface], children: list[str]) -> str:
    """The XML of one object (D-Bus specification, "Introspection Data Format")."""
    node = ElementTree.Element("node")
    node.extend(interface.xml for interface in interfaces)
    for child in sorted(children):
        ElementTree.SubElement(node, "node", name=child)
    return _DOCTYPE + ElementTree.tostring(node, encoding="unicode")


def escape(label: str) -> str:
    """``label`` as one element of an object path, as sd_bus_path_encode(3) does it."""
    if not label:
        return "_"
    return "".join(
        char if char.isascii() and (char.isalpha() or (char.isdigit() and index)) else f"_{ord(char):02x}"
        for index, char in enumerate(label)
    )
