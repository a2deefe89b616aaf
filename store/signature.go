// Signatures: how to see that a device belongs to something else.

package store

import (
	"bytes"
	"fmt"
	"io"
	"iter"
)

// A signature is a few bytes at a certain place by which programs recognize
// what is theirs.
type signature struct {
	name  string
	off   int64 // in bytes; from the end of the device if negative
	magic string
}

// known is in the order in which signatures are looked for: what says most
// first, because a partition table may also be the boot sector of something.
var known = slicesOf(
	[]signature{
		{"a snapstore", 0, headerMagic},
		{"ext2, ext3 or ext4", 0x438, "\x53\xef"},
		{"XFS", 0, "XFSB"},
		{"btrfs", 0x10040, "_BHRfS_M"},
		{"LUKS", 0, "LUKS\xba\xbe"},
		{"LUKS", 0x4000, "SKUL\xba\xbe"},
		{"an LVM physical volume", 0, "LABELONE"},
		{"an LVM physical volume", 512, "LABELONE"},
		{"an LVM physical volume", 1024, "LABELONE"},
		{"an LVM physical volume", 1536, "LABELONE"},
		{"a RAID member (md 1.1)", 0, mdMagic},
		{"a RAID member (md 1.2)", 4096, mdMagic},
		{"a RAID member (DDF)", -512, "\xde\x11\xde\x11"},
		{"bcache", 4096 + 24, "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"},
		{"bcachefs", 4096 + 24, "\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef"},
		{"F2FS", 1024, "\x10\x20\xf5\xf2"},
		{"EROFS", 1024, "\xe2\xe1\xf5\xe0"},
		{"squashfs", 0, "hsqs"},
		{"ReiserFS", 0x10034, "ReIsEr"},
		{"JFS", 0x8000, "JFS1"},
		{"NILFS2", 0x406, "\x34\x34"},
		{"GFS2", 0x10000, "\x01\x16\x19\x70"},
		{"HFS+", 1024, "H+\x00\x04"},
		{"APFS", 32, "NXSB"},
		{"ISO 9660", 0x8001, "CD001"},
		{"UDF", 0x8001, "BEA01"},
		{"Stratis", 516, "!Stra0tis\x86\xff\x02^\x41rh"},
		{"Ceph BlueStore", 0, "bluestore block device"},
		{"VDO", 0, "dmvdo001"},
		{"dm-integrity", 0, "integrt\x00"},
		{"dm-verity", 0, "verity\x00\x00"},
		{"a QCOW image", 0, "QFI\xfb"},
		{"BitLocker", 3, "-FVE-FS-"},
		{"NTFS", 3, "NTFS    "},
		{"exFAT", 3, "EXFAT   "},
		{"FAT", 54, "FAT12   "},
		{"FAT", 54, "FAT16   "},
		{"FAT", 82, "FAT32   "},
		{"a partition table (GPT)", 512, "EFI PART"},
		{"a partition table (GPT)", 4096, "EFI PART"},
		{"a partition table (GPT)", -512, "EFI PART"},
		{"a partition table (GPT)", -4096, "EFI PART"},
		{"a partition table (MBR)", 510, "\x55\xaa"},
	},
	swapSignatures(),
	zfsSignatures(),
)

const mdMagic = "\xfc\x4e\x2b\xa9"

func slicesOf(lists ...[]signature) (all []signature) {
	for _, l := range lists {
		all = append(all, l...)
	}
	return all
}

// swapSignatures stand at the end of the first page, whose size is that of the
// machine that made them.
func swapSignatures() (list []signature) {
	for page := int64(4096); page <= 65536; page *= 2 {
		for _, magic := range []string{"SWAPSPACE2", "SWAP-SPACE", "S1SUSPEND\x00", "S2SUSPEND\x00", "LINHIB0001"} {
			list = append(list, signature{"swap", page - 10, magic})
		}
	}
	return list
}

// zfsSignatures are those of the uberblocks in the two labels at the start and
// the two at the end, in either byte order.
func zfsSignatures() (list []signature) {
	const label = 256 << 10
	for _, start := range []int64{0, label, -2 * label, -label} {
		for off := int64(128 << 10); off < label; off += 1 << 10 {
			list = append(list,
				signature{"ZFS", start + off, "\x0c\xb1\xba\x00\x00\x00\x00\x00"},
				signature{"ZFS", start + off, "\x00\x00\x00\x00\x00\xba\xb1\x0c"})
		}
	}
	return list
}

// signatures yields those that r, of size bytes, bears, with their places
// counted from its start. An error ends it.
func signatures(r io.ReaderAt, size int64) iter.Seq2[signature, error] {
	return func(yield func(signature, error) bool) {
		for _, s := range append(known, mdAtEnd(size)...) {
			if s.off < 0 {
				s.off += size
			}
			if s.off < 0 || s.off+int64(len(s.magic)) > size {
				continue
			}
			b := make([]byte, len(s.magic))
			if _, err := r.ReadAt(b, s.off); err != nil {
				yield(s, fmt.Errorf("look for signatures: %w", cause(err)))
				return
			}
			if bytes.Equal(b, []byte(s.magic)) && !yield(s, nil) {
				return
			}
		}
	}
}

// mdAtEnd are the places near the end where md keeps superblocks of versions
// 0.90 and 1.0.
func mdAtEnd(size int64) []signature {
	return []signature{
		{"a RAID member (md 0.90)", size&^(64<<10-1) - 64<<10, mdMagic},
		{"a RAID member (md 1.0)", (size - 8<<10) &^ (4<<10 - 1), mdMagic},
	}
}
