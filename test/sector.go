// Package test drives the real blksnap binary with real clients. This file is
// what its tests have in common with the tests of other packages: sectors that
// say where and when they were written, so that a wrong one names its kind of
// fault.
package test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// SectorSize is the size in bytes of what is stamped and verified at a time.
const SectorSize = 512

// Layout of a sector, little-endian:
//
//	offset  size  field
//	     0     8  magic
//	     8     8  offset of the sector in its device, in bytes
//	    16     8  pass in which it was written
//	    24    16  name of the device, padded with zeroes
//	    40   468  bytes made from the fields above
//	   508     4  CRC-32C of bytes 0 to 507
//
// A sector of zeroes was never written: that is pass 0.
const (
	offsetAt = 8
	passAt   = 16
	deviceAt = 24
	fillAt   = 40
	sumAt    = SectorSize - 4
)

var (
	sectorMagic = []byte("blksnap\x01")
	castagnoli  = crc32.MakeTable(crc32.Castagnoli)
	zeroSector  = make([]byte, SectorSize)
)

// Stamp fills p with the sectors that device holds from off on when they were
// written in pass. The length of p and off are multiples of SectorSize, device
// has at most 16 bytes. Pass 0 fills p with zeroes.
func Stamp(p []byte, device string, off int64, pass uint64) {
	if pass == 0 {
		clear(p)
		return
	}
	for ; len(p) > 0; p, off = p[SectorSize:], off+SectorSize {
		stampSector(p[:SectorSize], device, off, pass)
	}
}

func stampSector(s []byte, device string, off int64, pass uint64) {
	clear(s)
	copy(s, sectorMagic)
	binary.LittleEndian.PutUint64(s[offsetAt:], uint64(off))
	binary.LittleEndian.PutUint64(s[passAt:], pass)
	copy(s[deviceAt:fillAt], device)

	// The fill differs from pass to pass, so that parts of two passes in one
	// sector do not go unnoticed.
	fill := uint64(off)*0x9e3779b97f4a7c15 ^ pass*0xbf58476d1ce4e5b9
	for i := fillAt; i < sumAt; i += 4 {
		fill = fill*6364136223846793005 + 1442695040888963407
		binary.LittleEndian.PutUint32(s[i:], uint32(fill>>32))
	}
	binary.LittleEndian.PutUint32(s[sumAt:], crc32.Checksum(s[:sumAt], castagnoli))
}

// Verify returns nil if each sector of p is one that device holds from off on
// and was written no earlier than in pass first and no later than in pass
// last. Otherwise it says of the first wrong one what was found instead.
func Verify(p []byte, device string, off int64, first, last uint64) error {
	for ; len(p) > 0; p, off = p[SectorSize:], off+SectorSize {
		pass, err := Pass(p[:SectorSize], device, off)
		switch {
		case err != nil:
			return err
		case pass < first:
			return fmt.Errorf("%s, sector at %d: written in pass %d, but pass %d was acknowledged before", device, off, pass, first)
		case pass > last:
			return fmt.Errorf("%s, sector at %d: written in pass %d, after the last that may be seen, %d", device, off, pass, last)
		}
	}
	return nil
}

// Pass returns the pass in which the sector s, read from device at off, was
// written: 0 for a sector of zeroes. It returns an error for a sector that
// device never held there.
func Pass(s []byte, device string, off int64) (uint64, error) {
	if bytes.Equal(s, zeroSector) {
		return 0, nil
	}
	if err := checkSector(s, device, off); err != nil {
		return 0, fmt.Errorf("%s, sector at %d: %w", device, off, err)
	}
	return binary.LittleEndian.Uint64(s[passAt:]), nil
}

func checkSector(s []byte, device string, off int64) error {
	if !bytes.HasPrefix(s, sectorMagic) {
		return fmt.Errorf("holds bytes that no test wrote, beginning with %x", s[:16])
	}
	if binary.LittleEndian.Uint32(s[sumAt:]) != crc32.Checksum(s[:sumAt], castagnoli) {
		return errors.New("is torn: its checksum is wrong")
	}
	if found := string(bytes.TrimRight(s[deviceAt:fillAt], "\x00")); found != device {
		return fmt.Errorf("holds a sector of %s", found)
	}
	if found := int64(binary.LittleEndian.Uint64(s[offsetAt:])); found != off {
		return fmt.Errorf("holds the sector of %d", found)
	}
	return nil
}
