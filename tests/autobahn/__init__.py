"""RFC 6455 as somebody else tests it: Autobahn's suite against the listener's echo build. See __main__.py."""
