// Where the parts of a file are.

package qcow2

import "math/bits"

// plan says where the parts of a file begin, in bytes; each begins where the one
// before it ends, and is whole clusters.
type plan struct {
	shift     uint  // cluster size as an exponent of two
	l1Entries int64 // one for each L2 table that could be

	l1, refTable, refBlocks, tables, data int64
	end                                   int64 // size of the file
}

// planFor returns the plan of a file for size bytes with so many L2 tables and
// data clusters.
func planFor(size int64, shift uint, tables, data int64) plan {
	cluster := int64(1) << shift
	l1Entries := ceil(size, cluster*(cluster/wordSize))
	l1 := ceil(l1Entries*wordSize, cluster)

	// Refcounts count themselves.
	var table, blocks int64
	for {
		all := 1 + l1 + table + blocks + tables + data
		moreBlocks := ceil(all*refcountSize, cluster)
		moreTable := ceil(moreBlocks*wordSize, cluster)
		if moreBlocks == blocks && moreTable == table {
			break
		}
		blocks, table = moreBlocks, moreTable
	}

	p := plan{shift: shift, l1Entries: l1Entries}
	p.l1 = cluster
	p.refTable = p.l1 + l1<<shift
	p.refBlocks = p.refTable + table<<shift
	p.tables = p.refBlocks + blocks<<shift
	p.data = p.tables + tables<<shift
	p.end = p.data + data<<shift
	return p
}

// clusterShift returns the cluster size for an image of size bytes, as an exponent
// of two: that of block bytes within the format's bounds, or larger where QEMU
// would not open the file if all of the image were data. So it does not depend on
// what the image holds.
func clusterShift(size, block int64) uint {
	shift := uint(bits.Len64(uint64(min(max(block, 1<<minShift), 1<<maxShift)))) - 1
	for ; shift < maxShift; shift++ {
		clusters := ceil(size, 1<<shift)
		p := planFor(size, shift, ceil(clusters, 1<<shift/wordSize), clusters)
		if p.refBlocks-p.refTable <= maxRefTable {
			break
		}
	}
	return shift
}

// ceil returns how many units n is, a part of one counted as one.
func ceil(n, unit int64) int64 { return (n + unit - 1) / unit }
