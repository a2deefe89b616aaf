package store

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"hash/crc32"
	"testing"

	"github.com/google/uuid"
)

var goldenHeader = header{
	id:    uuid.MustParse("00112233-4455-6677-8899-aabbccddeeff"),
	limit: 10 << 30,
}

// The bytes below are the format. If this test fails, old snapstores can no
// longer be read: raise the version instead of changing the bytes.
func TestHeaderGolden(t *testing.T) {
	b := goldenHeader.encode()
	if len(b) != 4096 {
		t.Fatalf("size of a header\n got %d\nwant 4096", len(b))
	}
	const want = "626c6b736e617020736e617073746f72" + // magic
		"01000000" + "00000100" + // version, size of a slot
		"00112233445566778899aabbccddeeff" + // UUID
		"0000008002000000" // limit
	if got := hex.EncodeToString(b[:48]); got != want {
		t.Errorf("first 48 bytes\n got %s\nwant %s", got, want)
	}
	if !bytes.Equal(b[48:4092], make([]byte, 4044)) {
		t.Errorf("bytes 48 to 4091\n got %x\nwant zeroes", b[48:4092])
	}
	if got, want := hex.EncodeToString(b[4092:]), "73bc4818"; got != want {
		t.Errorf("checksum\n got %s\nwant %s", got, want)
	}
	if h, err := decodeHeader(b); err != nil || h != goldenHeader {
		t.Errorf("decodeHeader of what encode returned\n got %+v, %v\nwant %+v", h, err, goldenHeader)
	}
}

func TestDecodeHeaderRefuses(t *testing.T) {
	change := func(off int, v uint32, sum bool) []byte {
		b := goldenHeader.encode()
		binary.LittleEndian.PutUint32(b[off:], v)
		if sum {
			binary.LittleEndian.PutUint32(b[4092:], crc32.Checksum(b[:4092], castagnoli))
		}
		return b
	}
	for _, tc := range []struct {
		name string
		b    []byte
		want error
	}{
		{"nothing", nil, ErrForeign},
		{"zeroes", make([]byte, 4096), ErrForeign},
		{"a byte of the magic", change(12, 0, true), ErrForeign},
		{"only the magic", goldenHeader.encode()[:16], ErrDamaged},
		{"a byte short", goldenHeader.encode()[:4095], ErrDamaged},
		{"newer version", change(16, 2, true), ErrNewer},
		{"newer version with a checksum elsewhere", change(16, 2, false), ErrNewer},
		{"version 0", change(16, 0, true), ErrDamaged},
		{"torn", change(2048, 1, false), ErrDamaged},
		{"checksum", change(4092, 1, false), ErrDamaged},
		{"slots of another size", change(20, 4096, true), ErrDamaged},
		{"limit of less than a slot", header{limit: SlotSize - 1}.encode(), ErrDamaged},
		{"negative limit", change(44, 0xffffffff, true), ErrDamaged},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := decodeHeader(tc.b); !errors.Is(err, tc.want) {
				t.Errorf("decodeHeader\n got %v\nwant %v", err, tc.want)
			}
		})
	}
}
