// The header by which a file or a block device is known to be a snapstore.

package store

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/google/uuid"
)

// A file or device begins with a header and slots follow from byte 65,536 on,
// the slot with index i at (i + 1) * 65,536. Which slots are in use is not
// written here: the tables of those who use them say it.
//
// Header, 4096 bytes, integers little-endian:
//
//	offset  size  field
//	     0    16  magic, "blksnap snapstor"
//	    16     4  version, 1
//	    20     4  size of a slot in bytes, 65,536
//	    24    16  UUID, by which tables know the part again
//	    40     8  limit in bytes: what blocks in use may take in all
//	    48  4044  zero
//	  4092     4  CRC-32C of bytes 0 to 4091
const (
	headerSize    = 4096
	headerMagic   = "blksnap snapstor"
	headerVersion = 1
	dataStart     = SlotSize
)

type header struct {
	id    uuid.UUID
	limit int64
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (h header) encode() []byte {
	b := make([]byte, headerSize)
	copy(b, headerMagic)
	binary.LittleEndian.PutUint32(b[16:], headerVersion)
	binary.LittleEndian.PutUint32(b[20:], SlotSize)
	copy(b[24:], h.id[:])
	binary.LittleEndian.PutUint64(b[40:], uint64(h.limit))
	binary.LittleEndian.PutUint32(b[4092:], crc32.Checksum(b[:4092], castagnoli))
	return b
}

// decodeHeader reads what encode returned. Its errors are ErrForeign, ErrNewer
// and ErrDamaged; b may be shorter than a header.
func decodeHeader(b []byte) (header, error) {
	if len(b) < len(headerMagic) || !bytes.Equal(b[:len(headerMagic)], []byte(headerMagic)) {
		return header{}, ErrForeign
	}
	if len(b) < headerSize {
		return header{}, fmt.Errorf("%w: its header ends after %d bytes", ErrDamaged, len(b))
	}
	// The version decides before the checksum: where a newer header keeps
	// its checksum is not ours to know.
	version := binary.LittleEndian.Uint32(b[16:])
	if version > headerVersion {
		return header{}, fmt.Errorf("%w: version %d of its header", ErrNewer, version)
	}
	if sum, said := crc32.Checksum(b[:4092], castagnoli), binary.LittleEndian.Uint32(b[4092:]); sum != said {
		return header{}, fmt.Errorf("%w: its header has checksum %08x and says %08x", ErrDamaged, sum, said)
	}
	h := header{limit: int64(binary.LittleEndian.Uint64(b[40:]))}
	copy(h.id[:], b[24:])
	if n := binary.LittleEndian.Uint32(b[20:]); version != headerVersion || n != SlotSize {
		return header{}, fmt.Errorf("%w: version %d with slots of %d bytes", ErrDamaged, version, n)
	}
	if err := checkLimit(h.limit); err != nil {
		return header{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return h, nil
}

// readHeader reads the header at the start of r.
func readHeader(r io.ReaderAt) (header, error) {
	b := make([]byte, headerSize)
	n, err := r.ReadAt(b, 0)
	if err != nil && err != io.EOF {
		return header{}, fmt.Errorf("read header: %w", err)
	}
	return decodeHeader(b[:n])
}
