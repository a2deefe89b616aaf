package test

import (
	"strings"
	"testing"
)

// A checker that finds nothing would let every other test pass.
func TestVerifyNamesTheFault(t *testing.T) {
	const off = 3 * SectorSize
	stamped := func(device string, off int64, pass uint64) []byte {
		s := make([]byte, SectorSize)
		Stamp(s, device, off, pass)
		return s
	}
	torn := stamped("vda", off, 2)
	copy(torn[256:], stamped("vda", off, 3)[256:])

	for _, tc := range []struct {
		name   string
		sector []byte
		want   string // empty: nothing wrong
	}{
		{"right", stamped("vda", off, 2), ""},
		{"first pass allowed", stamped("vda", off, 1), ""},
		{"too early", make([]byte, SectorSize), "written in pass 0, but pass 1 was acknowledged before"},
		{"too late", stamped("vda", off, 3), "written in pass 3, after the last that may be seen, 2"},
		{"elsewhere", stamped("vda", 9728, 2), "holds the sector of 9728"},
		{"other device", stamped("vdb", off, 2), "holds a sector of vdb"},
		{"torn", torn, "is torn"},
		{"foreign", []byte(strings.Repeat("x", SectorSize)), "holds bytes that no test wrote"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := Verify(tc.sector, "vda", off, 1, 2)
			switch {
			case tc.want == "" && err != nil:
				t.Errorf("Verify\n got %v\nwant nil", err)
			case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("Verify\n got %v\nwant an error with %q", err, tc.want)
			}
		})
	}
}

func TestStampFillsEverySector(t *testing.T) {
	p := make([]byte, 8*SectorSize)
	Stamp(p, "vda", 4096, 7)
	if err := Verify(p, "vda", 4096, 7, 7); err != nil {
		t.Errorf("what Stamp wrote does not verify: %v", err)
	}
}
