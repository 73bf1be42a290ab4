//! What an epoll event carries.

/// What an epoll event is about: an id, and in its low bits what kind of thing has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Token {
    Wake,
    Timer,
    Listener(u64),
    Handshake(u64),
    Uffd(u64),
    Process(u64),
    Probe,
}

impl Token {
    pub(super) fn encode(self) -> u64 {
        let (id, kind) = match self {
            Self::Wake => (0, 0),
            Self::Timer => (0, 1),
            Self::Listener(id) => (id, 2),
            Self::Handshake(id) => (id, 3),
            Self::Uffd(id) => (id, 4),
            Self::Process(id) => (id, 5),
            Self::Probe => (0, 6),
        };
        id << 3 | kind
    }

    pub(super) fn decode(data: u64) -> Self {
        let id = data >> 3;
        match data & 7 {
            0 => Self::Wake,
            1 => Self::Timer,
            2 => Self::Listener(id),
            3 => Self::Handshake(id),
            4 => Self::Uffd(id),
            6 => Self::Probe,
            _ => Self::Process(id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_its_way_through_epoll() {
        for token in [
            Token::Wake,
            Token::Timer,
            Token::Listener(7),
            Token::Handshake(8),
            Token::Uffd(1 << 50),
            Token::Process(9),
            Token::Probe,
        ] {
            assert_eq!(Token::decode(token.encode()), token);
        }
    }
}
