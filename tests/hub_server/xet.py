"""The store of the Xet protocol: xorbs (runs of chunks), shards (which chunks make a file), and how to rebuild a file.

Source: the published Xet protocol specification (binary layout of xorbs and shards, version 1 of the HTTP routes).
"""

import struct

CHUNK_HEADER = 8  # bytes
RECORD = 48  # bytes; all records of a shard have one size
HAS_VERIFICATION, HAS_METADATA = 1 << 31, 1 << 30
END_OF_FILES = b'\xff' * 32
XORB_FOOTER = b'XETBLOB'
UNCOMPRESSED, LZ4, GROUPED_LZ4 = 0, 1, 2


def hash_text(raw: bytes) -> str:
    """A Xet hash as text: four little-endian numbers of 64 bits, 16 hexadecimal digits each."""
    return ''.join(f'{number:016x}' for number in struct.unpack('<4Q', raw))


def parse_shard(content: bytes) -> list[tuple[str, list[tuple[str, int, int, int]], str | None]]:
    """Return (file, segments, sha256) of every file in a shard; a segment is (xorb, bytes, first chunk, end chunk).

    Raises:
        ValueError: not a shard of version 2.
    """
    if content[:14] != b'HFRepoMetaData' or struct.unpack_from('<Q', content, 32)[0] != 2:
        raise ValueError('not a shard of version 2')
    position, files = RECORD, []
    while content[position : position + 32] != END_OF_FILES:
        file = hash_text(content[position : position + 32])
        flags, count = struct.unpack_from('<2I', content, position + 32)
        position += RECORD
        segments = []
        for _ in range(count):
            _, size, first, end = struct.unpack_from('<4I', content, position + 32)
            segments.append((hash_text(content[position : position + 32]), size, first, end))
            position += RECORD
        if flags & HAS_VERIFICATION:
            position += RECORD * count
        sha256 = None
        if flags & HAS_METADATA:
            sha256 = hash_text(content[position : position + 32])
            position += RECORD
        files.append((file, segments, sha256))
    return files


def parse_xorb(content: bytes) -> list[tuple[int, int, int, int]]:
    """Return (start, end, compression, bytes when unpacked) of every chunk of a xorb, its header included.

    Raises:
        ValueError: a chunk of unknown version or compression.
    """
    position, chunks = 0, []
    while position + CHUNK_HEADER <= len(content) and content[position : position + 7] != XORB_FOOTER:
        version, compression = content[position], content[position + 4]
        if version != 0 or compression not in (UNCOMPRESSED, LZ4, GROUPED_LZ4):
            raise ValueError(f'chunk at {position}: version {version}, compression {compression}')
        end = position + CHUNK_HEADER + int.from_bytes(content[position + 1 : position + 4], 'little')
        size = int.from_bytes(content[position + 5 : position + 8], 'little')
        chunks.append((position, end, compression, size))
        position = end
    return chunks


def unpack(packed: bytes, compression: int) -> bytes:
    """The bytes of one chunk."""
    if compression == UNCOMPRESSED:
        return packed
    import lz4.frame  # not a dependency of anything here: clients are told to send uncompressed chunks

    content = lz4.frame.decompress(packed)
    if compression == LZ4:
        return content
    # Grouped: all first bytes of four come first, then all second ones, and so on.
    ungrouped, position = bytearray(len(content)), 0
    for idx in range(4):
        end = position + len(range(idx, len(content), 4))
        ungrouped[idx::4] = content[position:end]
        position = end
    return bytes(ungrouped)


class Cas:
    """Content-addressed store.

    Attributes:
        xorbs: the bytes of each xorb; `chunks` its parsed chunks.
        files: the segments of each file, by its Xet hash.
        file_of_sha256: Xet hash of each file, by its sha256.
    """

    def __init__(self):
        self.xorbs: dict[str, bytes] = {}
        self.chunks: dict[str, list] = {}
        self.files: dict[str, list] = {}
        self.file_of_sha256: dict[str, str] = {}

    def add_xorb(self, name: str, content: bytes) -> bool:
        """Keep a xorb and return whether it is new."""
        is_new = name not in self.xorbs
        self.chunks[name], self.xorbs[name] = parse_xorb(content), content
        return is_new

    def add_shard(self, content: bytes) -> bool:
        """Keep the files of a shard and return whether all their xorbs are here."""
        parsed = parse_shard(content)
        if any(xorb not in self.xorbs for _, segments, _ in parsed for xorb, *_ in segments):
            return False
        for file, segments, sha256 in parsed:
            self.files[file] = segments
            if sha256:
                self.file_of_sha256[sha256] = file
        return True

    def content(self, file: str) -> bytes:
        """The bytes of a file."""
        content = bytearray()
        for xorb, _, first, end in self.files[file]:
            for start, stop, compression, _ in self.chunks[xorb][first:end]:
                content += unpack(self.xorbs[xorb][start + CHUNK_HEADER : stop], compression)
        return bytes(content)

    def plan(self, file: str, first_byte: int, last_byte: int) -> tuple[int, list[dict]]:
        """Return how to rebuild a range of a file: bytes to skip at the start, and the runs of chunks to fetch.

        A run has `hash`, `range` (chunks), `unpacked_length` and `url_range` (bytes of the xorb, last included).
        """
        skipped, runs, position = 0, [], 0
        for xorb, _, first, end in self.files[file]:
            wanted = []
            for idx in range(first, end):
                size = self.chunks[xorb][idx][3]
                if position + size > first_byte and position <= last_byte:
                    if not runs and not wanted:
                        skipped = max(0, first_byte - position)
                    wanted.append(idx)
                position += size
            if wanted:
                run = self.chunks[xorb][wanted[0] : wanted[-1] + 1]
                chunks = {'start': wanted[0], 'end': wanted[-1] + 1}
                length = sum(size for *_, size in run)
                url_range = {'start': run[0][0], 'end': run[-1][1] - 1}
                runs.append({'hash': xorb, 'range': chunks, 'unpacked_length': length, 'url_range': url_range})
        return skipped, runs
