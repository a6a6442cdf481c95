"""How well regions are recognised: proposals in, detections out, average precision by LVIS's or
COCO's rules.
"""
